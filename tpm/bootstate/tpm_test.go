package bootstate_test

import (
	"bytes"
	"crypto"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/bootstate"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// TestTPMAcceptsSignedStates: a file's states, of which one is of the PCRs that
// the machine has, satisfy TPM2_PolicyAuthorize: in each bank, by each kind of key,
// with a policyRef and with none.
func TestTPMAcceptsSignedStates(t *testing.T) {
	ref := bootstate.Ref([16]byte{1}, 2)
	onMachine(t, func(tp transport.TPM) error {
		for bank := range authpolicy.Banks {
			for _, pcrs := range [][]int{{11}, {4, 7, 11}} {
				for kind, signer := range signers() {
					for _, ref := range [][]byte{nil, ref} {
						name := fmt.Sprintf("%v %v %s %x", bank, pcrs, kind, ref)
						now := sign(t, signer, present(t, tp, bank, pcrs...), ref, "now")
						f := file(t, sign(t, signer, values(bank, pcrs...), ref, "another"), now)
						if err := satisfy(tp, parse(t, marshal(t, f)), signer.Public(), ref); err != nil {
							t.Errorf("%s: %v", name, err)
						}
					}
				}
			}
		}
		return nil
	})
}

// TestTPMRefuses: a state signed for other PCR values, by another key or with another
// policyRef opens nothing.
func TestTPMRefuses(t *testing.T) {
	ref := bootstate.Ref([16]byte{1}, 2)
	onMachine(t, func(tp transport.TPM) error {
		now := present(t, tp, crypto.SHA256, 4, 7, 11)
		signer, other := signers()["P-256"], signers()["P-384"]
		for name, s := range map[string]bootstate.State{
			"other values":      sign(t, signer, values(crypto.SHA256, 4, 7, 11), ref, ""),
			"another key":       sign(t, other, now, ref, ""),
			"none, for systemd": sign(t, signer, now, nil, ""),
			"other generation":  sign(t, signer, now, bootstate.Ref([16]byte{1}, 3), ""),
			"other cluster":     sign(t, signer, now, bootstate.Ref([16]byte{2}, 2), ""),
		} {
			if err := satisfy(tp, file(t, s), signer.Public(), ref); !errors.Is(err, authpolicy.ErrNoSignedState) {
				t.Errorf("%s: %v, want ErrNoSignedState", name, err)
			}
			claims := s
			claims.KeyFingerprint, claims.Ref = must(bootstate.KeyFingerprint(signer.Public())), ref
			if err := satisfy(tp, file(t, claims), signer.Public(), ref); !errors.Is(err, authpolicy.ErrNoSignedState) {
				t.Errorf("%s, and it claims otherwise: %v, want ErrNoSignedState", name, err)
			}
		}
		return nil
	})
}

// TestTPMAgreesOnSignatures: with the check here left out, the TPM refuses what
// Verify refuses.
func TestTPMAgreesOnSignatures(t *testing.T) {
	onMachine(t, func(tp transport.TPM) error {
		now := present(t, tp, crypto.SHA256, 4, 7, 11)
		for kind, signer := range signers() {
			s := sign(t, signer, now, nil, "")
			for _, ref := range [][]byte{{1}, bootstate.Ref([16]byte{1}, 2)} {
				sig, err := authpolicy.Signature(signer.Public(), s.Signature)
				if err != nil {
					return err
				}
				term := authpolicy.Authorized{Key: must(authpolicy.PublicKey(signer.Public())), Ref: ref, States: []authpolicy.SignedState{
					{Bank: s.Bank, PCRs: s.PCRs, Digest: s.Digest, Signature: sig}}}
				if err := inSession(tp, term); !errors.Is(err, bootstate.ErrSignature) {
					t.Errorf("%s, policyRef %x: %v, want ErrSignature", kind, ref, err)
				}
			}
		}
		return nil
	})
}

// TestSignedLeavesBadStatesAside: a state that does not verify, or has PCRs that can be
// reset, is reported and does not prevent the use of the others.
func TestSignedLeavesBadStatesAside(t *testing.T) {
	signer := signers()["P-256"]
	key := must(authpolicy.PublicKey(signer.Public()))
	good := sign(t, signer, values(crypto.SHA256, 4, 11), nil, "good")
	bad, resettable := good, good
	bad.Digest, bad.What = bytes.Repeat([]byte{1}, 32), "bad"
	resettable.PCRs, resettable.What = []int{4, 23}, "resettable"
	states, refused := file(t, bad, resettable, good).Signed(key, nil)
	if len(states) != 1 || !bytes.Equal(states[0].Digest, good.Digest) {
		t.Errorf("%d states", len(states))
	}
	if len(refused) != 2 || !errors.Is(refused[0], bootstate.ErrSignature) || !strings.Contains(refused[0].Error(), "(bad)") ||
		!strings.Contains(refused[1].Error(), "PCR 23 can be reset") {
		t.Errorf("refused: %v", refused)
	}
	if states, refused := file(t, good).Signed(tpm2.TPMTPublic{}, nil); len(states) != 0 || len(refused) != 1 {
		t.Errorf("no key at all: %v, %v", states, refused)
	}
}

// onMachine runs f on a machine that booted a UKI.
func onMachine(t *testing.T, f func(transport.TPM) error) {
	t.Helper()
	if err := tpmtest.New(t, simboot.Baseline(simboot.UKI)).TPM().Do(t.Context(), f); err != nil {
		t.Fatal(err)
	}
}

func present(t *testing.T, tp transport.TPM, bank crypto.Hash, pcrs ...int) authpolicy.PCR {
	t.Helper()
	now, err := keys.ReadPCRs(tp, bank, pcrs)
	if err != nil {
		t.Fatal(err)
	}
	return authpolicy.PCR{Bank: bank, Values: now}
}

// satisfy opens a session as a slot that is sealed to pub and ref would.
func satisfy(t transport.TPM, f *bootstate.File, pub crypto.PublicKey, ref []byte) error {
	key, err := authpolicy.PublicKey(pub)
	if err != nil {
		return err
	}
	states, _ := f.Signed(key, ref)
	return inSession(t, authpolicy.Authorized{Key: key, Ref: ref, States: states})
}

func inSession(t transport.TPM, term authpolicy.Term) error {
	session, done, err := tpm2.PolicySession(t, tpm2.TPMAlgSHA256, authpolicy.NonceSize)
	if err != nil {
		return err
	}
	defer func() { _ = done() }()
	terms := authpolicy.Terms{term}
	if err := terms.Satisfy(t, session); err != nil {
		return err
	}
	want, err := terms.Digest()
	if err != nil {
		return err
	}
	got, err := tpm2.PolicyGetDigest{PolicySession: session.Handle()}.Execute(t)
	if err == nil && !bytes.Equal(got.PolicyDigest.Buffer, want) {
		err = fmt.Errorf("the session comes to %x, want %x", got.PolicyDigest.Buffer, want)
	}
	return err
}
