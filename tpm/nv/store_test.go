package nv_test

import (
	"bytes"
	"context"
	"crypto"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/nv"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// TestForgedPCRsOfTheAnchor: another boot leaves an anchor of its own, and somebody on the
// bus answers with that boot's PCRs, so that kleidi expects that index.
func TestForgedPCRsOfTheAnchor(t *testing.T) {
	b := newAnchorBench(t)
	store := &nv.AnchorStore{Anchor: b.anchor, Device: b.proxy.TPM(0), Bank: crypto.SHA256, PCRs: []int{4, 7, 11}, Holds: func(context.Context) error { return nil }}
	boot, honest := b.machine.Current(), b.present().Values
	other := boot
	other.CommandLine = "init=/bin/sh"
	b.machine.Reboot(other)
	theirs := b.present()
	b.terms = authpolicy.Terms{theirs}
	b.ok(store.Replace(t.Context(), filled(9)))
	b.machine.Reboot(boot)

	b.proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCPCRRead, Times: 10, Do: tpmtest.Change(func(response []byte) []byte {
		for i, value := range honest {
			response = bytes.Replace(response, value, theirs.Values[i], 1)
		}
		return response
	})})
	if value, err := store.Load(t.Context()); err == nil {
		t.Errorf("the anchor of another boot is believed: %x", value)
	} else if seal.CauseOf(err) == seal.CauseAnchor {
		t.Errorf("the forged PCRs are believed: %v", err)
	}
	b.proxy.Heal()
	b.ok(store.Replace(t.Context(), filled(1)))
	if value, err := store.Load(t.Context()); err != nil || value != filled(1) {
		t.Errorf("%x, %v", value, err)
	}
}
