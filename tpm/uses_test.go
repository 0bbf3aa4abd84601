package tpm_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/simboot"
)

// only returns the machine's boot state with some of its PCRs.
func (n *node) only(use tpm.Use, pcrs ...int) tpm.BootState {
	n.Helper()
	s, err := n.State(n.Context())
	if err != nil {
		n.Fatal(err)
	}
	s.Use = use
	maps.DeleteFunc(s.Values, func(i int, _ []byte) bool { return !slices.Contains(pcrs, i) })
	return s
}

func (n *node) wrapState(s tpm.BootState) (seal.Slot, *seal.Secret) {
	n.Helper()
	kek := n.KEK()
	slot, err := n.WrapState(n.Context(), kek, s)
	if err != nil {
		n.Fatal(err)
	}
	return slot, kek
}

// TestSignedSlot: the slot opens in any boot state that the key signed for its
// reference, while its own PCRs stay the same.
func TestSignedSlot(t *testing.T) {
	n := newNode(t)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public, err := authpolicy.PublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	ref := []byte("generation 1")
	sign := func(ref []byte) authpolicy.SignedState {
		pcr := n.only(tpm.UsePresent, 4, 11).PCR
		digest, err := authpolicy.ApprovedDigest(pcr)
		if err != nil {
			t.Fatal(err)
		}
		hash, err := authpolicy.AuthorizedHash(digest, ref)
		if err != nil {
			t.Fatal(err)
		}
		r, s, err := ecdsa.Sign(rand.Reader, key, hash)
		if err != nil {
			t.Fatal(err)
		}
		return authpolicy.SignedState{Bank: pcr.Bank, PCRs: []int{4, 11}, Digest: digest, Signature: tpm2.TPMTSignature{
			SigAlg: tpm2.TPMAlgECDSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{
				Hash: tpm2.TPMAlgSHA256, SignatureR: tpm2.TPM2BECCParameter{Buffer: r.FillBytes(make([]byte, 32))}, SignatureS: tpm2.TPM2BECCParameter{Buffer: s.FillBytes(make([]byte, 32))},
			})}}
	}
	state := n.only(tpm.UseSigned, 7)
	state.Signer = &tpm.Signer{Key: public, Ref: ref}
	slot, kek := n.wrapState(state)
	known := []authpolicy.SignedState{}
	n.Signed = func(s tpm.Signer) []authpolicy.SignedState {
		if string(s.Ref) != string(ref) {
			t.Errorf("asked for states of %q", s.Ref)
		}
		return known
	}
	opens := func(what string, want error) {
		t.Helper()
		if want == nil {
			n.Opens(slot, kek)
			return
		}
		if err := n.Refuses(slot, seal.CauseBootState); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", what, err, want)
		}
	}
	opens("nothing signed", authpolicy.ErrNoSignedState)
	known = append(known, sign(ref))
	opens("the baseline is signed", nil)
	next := simboot.Baseline(simboot.UKI)
	next.Kernel = "6.13"
	n.Machine.Reboot(next)
	opens("another kernel", authpolicy.ErrNoSignedState)
	known = append(known, sign([]byte("generation 2")))
	opens("signed for another reference", authpolicy.ErrSignature)
	known = append(known, sign(ref))
	opens("it is signed too", nil)
	next.Keys = "Mallory"
	n.Machine.Reboot(next)
	known = append(known, sign(ref))
	opens("other keys", authpolicy.ErrBootState)
	n.Signed = nil
	opens("no states at hand", authpolicy.ErrNoSignedState)
}

// TestSuspendSlot: the slot opens in any boot with the same values of its PCRs, in the
// stated number of boots.
func TestSuspendSlot(t *testing.T) {
	n := newNode(t)
	state := n.only(tpm.UseSuspend, 7)
	n.Must(func(t transport.TPM) (err error) {
		state.Resets, err = authpolicy.ResetCount(t)
		return err
	})
	state.Resets += 2
	slot, kek := n.wrapState(state)
	for boots := range 4 {
		if boots <= 2 {
			n.Opens(slot, kek)
		} else if err := n.Refuses(slot, seal.CauseBootState, "the suspension is over"); !errors.Is(err, authpolicy.ErrResets) {
			t.Error(err)
		}
		b := simboot.Baseline(simboot.UKI)
		b.CommandLine = strings.Repeat("x", boots+1)
		n.Machine.Reboot(b)
	}
}

// TestSuspendSlotCountsRestarts: a TPM2_Shutdown(STATE), which any system can send
// before it resets the machine, hides no boot.
func TestSuspendSlotCountsRestarts(t *testing.T) {
	n := newNode(t)
	state := n.only(tpm.UseSuspend, 7)
	count, err := keys.ResetCount(t.Context(), n.Device, n.Owner)
	if err != nil {
		t.Fatal(err)
	}
	state.Resets = count + 1
	slot, kek := n.wrapState(state)
	n.Opens(slot, kek)
	n.Must(func(t transport.TPM) error {
		_, err := tpm2.Shutdown{ShutdownType: tpm2.TPMSUState}.Execute(t)
		return err
	})
	n.Machine.CutPower()
	n.Machine.Reboot(simboot.Baseline(simboot.UKI))
	if now, err := keys.ResetCount(t.Context(), n.Device, n.Owner); err != nil || now != count {
		t.Fatalf("it was no restart: %d resets, then %d, %v", count, now, err)
	}
	n.Refuses(slot, seal.CauseBootState, "the suspension is over")
	n.Machine.Reboot(simboot.Baseline(simboot.UKI))
	n.Opens(slot, kek)
	n.Machine.Reboot(simboot.Baseline(simboot.UKI))
	n.Refuses(slot, seal.CauseBootState, "the suspension is over")
}

// TestUsesAreOfTheirForm: the use and the members of a slot must agree, and a slot
// without members of the later form must have the first form.
func TestUsesAreOfTheirForm(t *testing.T) {
	n := newNode(t)
	suspend := n.only(tpm.UseSuspend, 7)
	suspend.Resets = 9
	for _, s := range []tpm.BootState{n.only(tpm.UsePresent, 4, 7), n.only(tpm.UseNext, 4, 7), suspend} {
		slot, _ := n.wrapState(s)
		if d, err := tpm.DemandOf(slot, n.Counter); err != nil || d.State.Use != s.Use || d.State.Resets != s.Resets {
			t.Errorf("%q: %+v, %v", s.Use, d.State, err)
		}
		for name, change := range map[string]func(map[string]any){
			"another use": func(m map[string]any) { m["use"] = map[tpm.Use]string{tpm.UsePresent: "next"}[s.Use] },
			"unknown use": func(m map[string]any) { m["use"] = "everything" },
			"signed":      func(m map[string]any) { m["use"] = "signed" },
			"another form": func(m map[string]any) {
				m["form"] = map[bool]string{true: "sealed-v2", false: "sealed-v1"}[s.Use == ""]
			},
			"other resets":  func(m map[string]any) { m["resets"] = map[string]any{"atMost": 1000} },
			"with a signer": func(m map[string]any) { m["signer"] = map[string]any{"key": "AA==", "ref": ""} },
		} {
			var m map[string]any
			if err := json.Unmarshal(slot.Data, &m); err != nil {
				t.Fatal(err)
			}
			change(m)
			forged := slot
			var err error
			if forged.Data, err = json.Marshal(m); err != nil {
				t.Fatal(err)
			}
			if _, err := n.Unwrap(t.Context(), forged); seal.CauseOf(err) != seal.CauseSlotCorrupt {
				t.Errorf("%q, %s: %v", s.Use, name, err)
			}
		}
	}
}
