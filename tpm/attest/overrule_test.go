package attest_test

import (
	"bytes"
	"crypto"
	"errors"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/unlock"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// suspension seals a KEK to the present PCR 7 alone, for two more boots.
func (n *node) suspension() seal.Slot {
	n.Helper()
	state, err := n.gate.State(n.Context())
	if err != nil {
		n.Fatal(err)
	}
	resets, err := keys.ResetCount(n.Context(), n.gate.Device, keys.Owner{})
	if err != nil {
		n.Fatal(err)
	}
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		n.Fatal(err)
	}
	defer kek.Close()
	slot, err := n.wrapper.WrapState(n.Context(), kek, tpm.BootState{
		PCR: authpolicy.PCR{Bank: state.Bank, Values: map[int][]byte{7: state.Values[7]}}, Use: tpm.UseSuspend, Resets: resets + 2})
	if err != nil {
		n.Fatal(err)
	}
	return slot
}

// TestSuspensionOverrulesForItsOwnSlotOnly: during a suspension, a boot that the boot
// policy refuses opens the suspension's keyslot, and no other.
func TestSuspensionOverrulesForItsOwnSlotOnly(t *testing.T) {
	n := newNode(t, simboot.Baseline(simboot.UKI))
	present := n.seal()
	policy, err := bootpolicy.Record(n.gate.Last().Log, crypto.SHA256, []int{4, 7, 11})
	if err != nil {
		t.Fatal(err)
	}
	n.gate.BootPolicy = func() (*bootpolicy.BootPolicy, error) { return policy, nil }
	suspension := n.suspension()
	b := n.machine.Current()
	b.Kernel = "6.12.99-amd64"
	n.machine.Reboot(b)

	err = n.gate.Attest(t.Context(), []seal.Slot{present})
	if _, ok := errors.AsType[unlock.Overruled](err); ok || seal.CauseOf(err) != seal.CauseBootPolicy {
		t.Errorf("without a suspension: %v, overruled: %v", err, ok)
	}
	err = n.gate.Attest(t.Context(), []seal.Slot{present, suspension})
	overruled, ok := errors.AsType[unlock.Overruled](err)
	if !ok || seal.CauseOf(err) != seal.CauseBootPolicy {
		t.Fatalf("during a suspension: %v", err)
	}
	elsewhere, otherType, damaged := suspension, suspension, suspension
	elsewhere.Node, otherType.Type, damaged.Data = "beta", seal.TypeVault, suspension.Data[1:]
	for name, c := range map[string]struct {
		slot seal.Slot
		want bool
	}{
		"the suspension":            {suspension, true},
		"the present boot":          {present, false},
		"another node's suspension": {elsewhere, false},
		"another type":              {otherType, false},
		"damaged":                   {damaged, false},
	} {
		if got := overruled.Overrules(c.slot); got != c.want {
			t.Errorf("%s: overruled: %v, want %v", name, got, c.want)
		}
	}
}

// TestFreshNonce: no two quotes of the gate are over the same nonce, so a quote of an
// earlier boot is useless.
func TestFreshNonce(t *testing.T) {
	n := newNode(t, simboot.Baseline(simboot.UKI))
	slot := n.seal()
	proxy := tpmtest.NewProxy(t, n.machine)
	n.gate.Device = proxy.TPM(0)
	seen := map[string]bool{}
	for range 3 {
		proxy.Forget()
		if err := n.gate.Attest(t.Context(), []seal.Slot{slot}); err != nil {
			t.Fatal(err)
		}
		nonce := quotedNonce(t, proxy)
		if len(nonce) < 32 || seen[string(nonce)] {
			t.Errorf("quoted over the nonce %x, of %d bytes; seen before: %v", nonce, len(nonce), seen[string(nonce)])
		}
		seen[string(nonce)] = true
	}
}

// quotedNonce returns the extraData of the only quote that crossed the bus.
func quotedNonce(t *testing.T, p *tpmtest.Proxy) []byte {
	t.Helper()
	if n := p.Count(tpm2.TPMCCQuote); n != 1 {
		t.Fatalf("%d quotes, want 1", n)
	}
	for _, e := range p.Traffic() {
		if e.Code != tpm2.TPMCCQuote {
			continue
		}
		at := bytes.Index(e.Response, []byte("\xffTCG")) // TPM_GENERATED_VALUE begins each statement of a TPM
		if at < 0 {
			t.Fatalf("no quote in %x", e.Response)
		}
		statement, err := tpm2.Unmarshal[tpm2.TPMSAttest](e.Response[at:])
		if err != nil {
			t.Fatal(err)
		}
		return statement.ExtraData.Buffer
	}
	return nil
}
