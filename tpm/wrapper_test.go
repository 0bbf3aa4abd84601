package tpm_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/sealtest"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/nv"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

func TestConformance(t *testing.T) {
	sealtest.Run(t, func(t *testing.T) sealtest.Harness {
		return sealtest.Harness{Wrapper: newNode(t), Other: newNode(t), OtherCause: seal.CauseOtherTPM, Stride: 7}
	})
}

// TestOtherBootState: a slot opens in the boot state in which it was made, and in no
// other. The refusal carries the slot's demand.
func TestOtherBootState(t *testing.T) {
	n := newNode(t)
	kek := n.kek()
	slot := n.wrap(kek)
	was := n.machine.Current()
	for name, change := range map[string]func(*simboot.Boot){
		"kernel":       func(b *simboot.Boot) { b.Kernel = "6.12.99+evil-amd64" },
		"command line": func(b *simboot.Boot) { b.CommandLine += " init=/bin/sh" },
		"initrd":       func(b *simboot.Boot) { b.Initrd = "another" },
		"Secure Boot":  func(b *simboot.Boot) { b.SecureBoot = false },
		"dbx":          func(b *simboot.Boot) { b.Dbx = "2019-01-01" },
		"loader":       func(b *simboot.Boot) { b.LoaderVersion = "1" },
	} {
		b := was
		change(&b)
		n.machine.Reboot(b)
		err := n.refuses(slot, seal.CauseBootState, "did not boot as it did", "kleidi recover")
		state, ok := errors.AsType[*tpm.StateError](err)
		if !ok {
			t.Fatalf("%s: %v is no StateError", name, err)
		}
		if !errors.Is(err, authpolicy.ErrBootState) || len(state.Was.Values) != 3 || len(state.Was.Record) == 0 {
			t.Errorf("%s: %v with %d PCRs", name, err, len(state.Was.Values))
		}
	}
	n.machine.Reboot(was)
	n.opens(slot, kek)
	b := was
	b.Firmware = "edk2 2099.01" // PCR 0, which the slot does not name
	n.machine.Reboot(b)
	n.opens(slot, kek)
}

// TestEpochPassed: a kept copy of a slot no longer opens once a reseal has settled. The
// new slot opens before and after.
func TestEpochPassed(t *testing.T) {
	n := newNode(t)
	kek := n.kek()
	old := n.wrap(kek)
	next, err := n.ForNextEpoch(nil).Wrap(t.Context(), kek)
	if err != nil {
		t.Fatal(err)
	}
	n.opens(old, kek)
	n.opens(next, kek) // both open until the keyring with the new slot is saved
	for range 2 {      // settling again, as every start does, changes nothing
		if err := n.Settle(t.Context(), []seal.Slot{next}); err != nil {
			t.Fatal(err)
		}
		err = n.refuses(old, seal.CauseEpoch, "revoked by a later reseal", "kleidi recover")
		if !errors.Is(err, authpolicy.ErrEpoch) {
			t.Error(err)
		}
		n.opens(next, kek)
	}
	n.opens(n.wrap(kek), kek) // a slot of the present epoch
	if err := n.Settle(t.Context(), []seal.Slot{old}); err != nil {
		t.Errorf("settling on an old slot: %v", err)
	}
	n.opens(next, kek)
}

// TestSettle: what ends an epoch, and what does not.
func TestSettle(t *testing.T) {
	n := newNode(t)
	kek := n.kek()
	old := n.wrap(kek)
	next, err := n.ForNextEpoch(nil).Wrap(t.Context(), kek)
	if err != nil {
		t.Fatal(err)
	}
	elsewhere := next
	elsewhere.Node = "beta"
	recovery := seal.Slot{Type: seal.TypeRecovery, Data: json.RawMessage(`{}`)}
	for name, slots := range map[string][]seal.Slot{
		"none": nil, "the old one": {old}, "both": {next, old}, "both, otherwise": {old, next}, "another node's": {elsewhere}, "none of a TPM": {recovery},
	} {
		if err := n.Settle(t.Context(), slots); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		n.opens(old, kek)
	}
	damaged := next
	damaged.Data = next.Data[:len(next.Data)-1]
	n.want(n.Settle(t.Context(), []seal.Slot{damaged}), seal.CauseSlotCorrupt)
	n.opens(old, kek)
	if err := n.Settle(t.Context(), []seal.Slot{recovery, elsewhere, next}); err != nil {
		t.Fatal(err)
	}
	n.refuses(old, seal.CauseEpoch)
	n.opens(next, kek)
}

// TestSettleAfterACrash: after a power failure between save and Settle all slots open;
// the next start settles.
func TestSettleAfterACrash(t *testing.T) {
	n := newNode(t)
	kek := n.kek()
	old := n.wrap(kek)
	next, err := n.ForNextEpoch(nil).Wrap(t.Context(), kek)
	if err != nil {
		t.Fatal(err)
	}
	n.proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCNVIncrement, Do: tpmtest.Drop})
	n.want(n.Settle(t.Context(), []seal.Slot{next}), seal.CauseUnavailable)
	n.proxy.Heal()
	n.machine.CutPower()
	n.machine.Reboot(n.machine.Current())
	n.opens(next, kek)
	n.opens(old, kek)
	n.proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCNVIncrement, Do: func(_ []byte, send func() []byte) []byte { send(); return nil }})
	n.want(n.Settle(t.Context(), []seal.Slot{next}), seal.CauseUnavailable) // the TPM counted, but nobody knows
	n.proxy.Heal()
	n.machine.CutPower()
	n.machine.Reboot(n.machine.Current())
	if err := n.Settle(t.Context(), []seal.Slot{next}); err != nil {
		t.Fatal(err)
	}
	n.refuses(old, seal.CauseEpoch)
	n.opens(next, kek)
}

// TestOtherMachine: slots of another machine, and of another node of the keyring.
func TestOtherMachine(t *testing.T) {
	n, other := newNode(t), newNode(t)
	slot := n.wrap(n.kek())
	other.refuses(slot, seal.CauseOtherTPM, "another TPM", "endorsement key", "put the disk back")
	slot.Node = "beta"
	if _, err := n.Unwrap(t.Context(), slot); !errors.Is(err, seal.ErrNotMine) {
		t.Errorf("another node's slot: %v", err)
	}
	slot.Node = ""
	if _, err := n.Unwrap(t.Context(), slot); !errors.Is(err, seal.ErrNotMine) {
		t.Errorf("a slot of no node: %v", err)
	}
}

// TestClearedTPM is told from another TPM by the endorsement key, which stays.
func TestClearedTPM(t *testing.T) {
	n := newNode(t)
	slot := n.wrap(n.kek())
	if err := n.machine.Clear(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.refuses(slot, seal.CauseTPMCleared, "cleared", "kleidi recover")
	n.proxy.Forget()
	_, err := n.WrapLike(t.Context(), n.kek(), slot) // as a rotation does
	if n.want(err, seal.CauseTPMCleared, "kleidi recover"); n.proxy.Count(tpm2.TPMCCCreate) != 0 {
		t.Error("a KEK was sealed to a cleared TPM")
	}
	// Sealing needs the counter again; recover provides it.
	_, err = n.Wrap(t.Context(), n.kek())
	n.want(err, seal.CauseEpoch, "gone")
	if _, err := n.Provision(t.Context()); err != nil {
		t.Fatal(err)
	}
	kek := n.kek()
	n.opens(n.wrap(kek), kek)
}

// TestCounterReplaced: with a missing, newly defined or forged counter, nothing opens.
func TestCounterReplaced(t *testing.T) {
	n := newNode(t)
	kek := n.kek()
	slot := n.wrap(kek)
	index := tpm2.TPMHandle(nv.DefaultEpochIndex)
	handle := func(tp transport.TPM) (tpm2.NamedHandle, error) {
		r, err := tpm2.NVReadPublic{NVIndex: index}.Execute(tp)
		if err != nil {
			return tpm2.NamedHandle{}, err
		}
		return tpm2.NamedHandle{Handle: index, Name: r.NVName}, nil
	}
	undefine := func(tp transport.TPM) error {
		h, err := handle(tp)
		if err != nil {
			return err
		}
		_, err = tpm2.NVUndefineSpace{AuthHandle: ownerHandle(), NVIndex: h}.Execute(tp)
		return err
	}
	n.must(undefine)
	n.refuses(slot, seal.CauseEpoch, "epoch counter", "kleidi recover")
	n.must(func(tp transport.TPM) error { // zeros, which are below every epoch
		public := tpm2.TPMSNVPublic{NVIndex: index, NameAlg: tpm2.TPMAlgSHA256, DataSize: 8,
			Attributes: tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, AuthRead: true, AuthWrite: true, NoDA: true}}
		if _, err := (tpm2.NVDefineSpace{AuthHandle: ownerHandle(), PublicInfo: tpm2.New2B(public)}).Execute(tp); err != nil {
			return err
		}
		h, err := handle(tp)
		if err != nil {
			return err
		}
		_, err = tpm2.NVWrite{AuthHandle: ownerHandle(), NVIndex: h, Data: tpm2.TPM2BMaxNVBuffer{Buffer: make([]byte, 8)}}.Execute(tp)
		return err
	})
	n.refuses(slot, seal.CauseEpoch, "epoch counter", "kleidi recover")
	n.must(undefine)
	if _, err := n.Provision(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.refuses(slot, seal.CauseEpoch, "revoked")
	n.opens(n.wrap(kek), kek)
}

// TestLockout: a locked-out TPM still opens slots, which no wrong guess can lock. If a
// TPM does answer with a lockout, the cause says so.
func TestLockout(t *testing.T) {
	n := newNode(t)
	kek := n.kek()
	slot := n.wrap(kek)
	n.must(lockOut)
	n.opens(slot, kek)
	n.opens(n.wrap(kek), kek)
	for _, code := range []tpm2.TPMCC{tpm2.TPMCCUnseal, tpm2.TPMCCLoad, tpm2.TPMCCPolicyNV, tpm2.TPMCCStartAuthSession, tpm2.TPMCCCreatePrimary} {
		n.proxy.Inject(tpmtest.Fault{On: code, Do: tpmtest.Code(tpm2.TPMRCLockout)})
		n.refuses(slot, seal.CauseLockout, "dictionary-attack lockout", "tpm2_dictionarylockout")
	}
	n.proxy.Heal()
	n.opens(slot, kek)
}

// lockOut guesses an object's authorization until the TPM locks out.
func lockOut(t transport.TPM) error {
	// TPM2_DictionaryAttackParameters, which go-tpm has not: two tries, an hour each.
	r0, err := t.Send([]byte{0x80, 2, 0, 0, 0, 39, 0, 0, 1, 0x3a, 0x40, 0, 0, 0x0a, 0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0,
		0, 0, 0, 2, 0, 0, 0x0e, 0x10, 0, 0, 0x0e, 0x10})
	if err != nil || !bytes.Equal(r0[6:10], make([]byte, 4)) {
		return fmt.Errorf("TPM2_DictionaryAttackParameters: %x, %w", r0, err)
	}
	template := tpm2.ECCSRKTemplate
	template.ObjectAttributes.NoDA = false
	r, err := tpm2.CreatePrimary{PrimaryHandle: ownerHandle(), InPublic: tpm2.New2B(template),
		InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{UserAuth: tpm2.TPM2BAuth{Buffer: []byte("right")}}}}.Execute(t)
	if err != nil {
		return err
	}
	defer func() { _, _ = tpm2.FlushContext{FlushHandle: r.ObjectHandle}.Execute(t) }()
	for range 10 {
		_, err = tpm2.Create{ParentHandle: tpm2.AuthHandle{Handle: r.ObjectHandle, Name: r.Name, Auth: tpm2.PasswordAuth([]byte("wrong"))},
			InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(t)
		if errors.Is(err, tpm2.TPMRCLockout) {
			return nil
		}
	}
	return errors.New("the TPM does not lock out")
}
