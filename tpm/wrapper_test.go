package tpm_test

import (
	"encoding/json"
	"errors"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/sealtest"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/internal/nodetest"
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
	kek := n.KEK()
	slot := n.Sealed(kek)
	was := n.Machine.Current()
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
		n.Machine.Reboot(b)
		err := n.Refuses(slot, seal.CauseBootState, "did not boot as it did", "kleidi recover")
		state, ok := errors.AsType[*tpm.StateError](err)
		if !ok {
			t.Fatalf("%s: %v is no StateError", name, err)
		}
		if !errors.Is(err, authpolicy.ErrBootState) || len(state.Was.Values) != 3 || len(state.Was.Record) == 0 {
			t.Errorf("%s: %v with %d PCRs", name, err, len(state.Was.Values))
		}
	}
	n.Machine.Reboot(was)
	n.Opens(slot, kek)
	b := was
	b.Firmware = "edk2 2099.01" // PCR 0, which the slot does not name
	n.Machine.Reboot(b)
	n.Opens(slot, kek)
}

// TestEpochPassed: a kept copy of a slot no longer opens once a reseal has settled. The
// new slot opens before and after.
func TestEpochPassed(t *testing.T) {
	n := newNode(t)
	kek := n.KEK()
	old := n.Sealed(kek)
	next, err := n.ForNextEpoch(nil).Wrap(t.Context(), kek)
	if err != nil {
		t.Fatal(err)
	}
	n.Opens(old, kek)
	n.Opens(next, kek) // both open until the keyring with the new slot is saved
	for range 2 {      // settling again, as every start does, changes nothing
		if err := n.Settle(t.Context(), []seal.Slot{next}); err != nil {
			t.Fatal(err)
		}
		err = n.Refuses(old, seal.CauseEpoch, "revoked by a later reseal", "kleidi recover")
		if !errors.Is(err, authpolicy.ErrEpoch) {
			t.Error(err)
		}
		n.Opens(next, kek)
	}
	n.Opens(n.Sealed(kek), kek) // a slot of the present epoch
	if err := n.Settle(t.Context(), []seal.Slot{old}); err != nil {
		t.Errorf("settling on an old slot: %v", err)
	}
	n.Opens(next, kek)
}

// TestSettle: what ends an epoch, and what does not.
func TestSettle(t *testing.T) {
	n := newNode(t)
	kek := n.KEK()
	old := n.Sealed(kek)
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
		n.Opens(old, kek)
	}
	damaged := next
	damaged.Data = next.Data[:len(next.Data)-1]
	n.Want(n.Settle(t.Context(), []seal.Slot{damaged}), seal.CauseSlotCorrupt)
	n.Opens(old, kek)
	if err := n.Settle(t.Context(), []seal.Slot{recovery, elsewhere, next}); err != nil {
		t.Fatal(err)
	}
	n.Refuses(old, seal.CauseEpoch)
	n.Opens(next, kek)
}

// TestSettleAfterACrash: after a power failure between save and Settle all slots open;
// the next start settles.
func TestSettleAfterACrash(t *testing.T) {
	n := newNode(t)
	kek := n.KEK()
	old := n.Sealed(kek)
	next, err := n.ForNextEpoch(nil).Wrap(t.Context(), kek)
	if err != nil {
		t.Fatal(err)
	}
	n.Proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCNVIncrement, Do: tpmtest.Drop})
	n.Want(n.Settle(t.Context(), []seal.Slot{next}), seal.CauseUnavailable)
	n.Proxy.Heal()
	n.Machine.CutPower()
	n.Machine.Reboot(n.Machine.Current())
	n.Opens(next, kek)
	n.Opens(old, kek)
	n.Proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCNVIncrement, Do: func(_ []byte, send func() []byte) []byte { send(); return nil }})
	n.Want(n.Settle(t.Context(), []seal.Slot{next}), seal.CauseUnavailable) // the TPM counted, but nobody knows
	n.Proxy.Heal()
	n.Machine.CutPower()
	n.Machine.Reboot(n.Machine.Current())
	if err := n.Settle(t.Context(), []seal.Slot{next}); err != nil {
		t.Fatal(err)
	}
	n.Refuses(old, seal.CauseEpoch)
	n.Opens(next, kek)
}

// TestOtherMachine: slots of another machine, and of another node of the keyring.
func TestOtherMachine(t *testing.T) {
	n, other := newNode(t), newNode(t)
	slot := n.Sealed(n.KEK())
	other.Refuses(slot, seal.CauseOtherTPM, "another TPM", "endorsement key", "put the disk back")
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
	slot := n.Sealed(n.KEK())
	if err := n.Machine.Clear(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.Refuses(slot, seal.CauseTPMCleared, "cleared", "kleidi recover")
	n.Proxy.Forget()
	_, err := n.WrapLike(t.Context(), n.KEK(), slot) // as a rotation does
	if n.Want(err, seal.CauseTPMCleared, "kleidi recover"); n.Proxy.Count(tpm2.TPMCCCreate) != 0 {
		t.Error("a KEK was sealed to a cleared TPM")
	}
	// Sealing needs the counter again; recover provides it.
	_, err = n.Wrap(t.Context(), n.KEK())
	n.Want(err, seal.CauseEpoch, "gone")
	if _, err := n.Provision(t.Context()); err != nil {
		t.Fatal(err)
	}
	kek := n.KEK()
	n.Opens(n.Sealed(kek), kek)
}

// TestCounterReplaced: with a missing, newly defined or forged counter, nothing opens.
func TestCounterReplaced(t *testing.T) {
	n := newNode(t)
	kek := n.KEK()
	slot := n.Sealed(kek)
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
		_, err = tpm2.NVUndefineSpace{AuthHandle: nodetest.OwnerHandle(), NVIndex: h}.Execute(tp)
		return err
	}
	n.Must(undefine)
	n.Refuses(slot, seal.CauseEpoch, "epoch counter", "kleidi recover")
	n.Must(func(tp transport.TPM) error { // zeros, which are below every epoch
		public := tpm2.TPMSNVPublic{NVIndex: index, NameAlg: tpm2.TPMAlgSHA256, DataSize: 8,
			Attributes: tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, AuthRead: true, AuthWrite: true, NoDA: true}}
		if _, err := (tpm2.NVDefineSpace{AuthHandle: nodetest.OwnerHandle(), PublicInfo: tpm2.New2B(public)}).Execute(tp); err != nil {
			return err
		}
		h, err := handle(tp)
		if err != nil {
			return err
		}
		_, err = tpm2.NVWrite{AuthHandle: nodetest.OwnerHandle(), NVIndex: h, Data: tpm2.TPM2BMaxNVBuffer{Buffer: make([]byte, 8)}}.Execute(tp)
		return err
	})
	n.Refuses(slot, seal.CauseEpoch, "epoch counter", "kleidi recover")
	n.Must(undefine)
	if _, err := n.Provision(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.Refuses(slot, seal.CauseEpoch, "revoked")
	n.Opens(n.Sealed(kek), kek)
}

// TestLockout: a locked-out TPM still opens slots, which no wrong guess can lock. If a
// TPM does answer with a lockout, the cause says so.
func TestLockout(t *testing.T) {
	n := newNode(t)
	kek := n.KEK()
	slot := n.Sealed(kek)
	n.Must(nodetest.LockOut)
	n.Opens(slot, kek)
	n.Opens(n.Sealed(kek), kek)
	for _, code := range []tpm2.TPMCC{tpm2.TPMCCUnseal, tpm2.TPMCCLoad, tpm2.TPMCCPolicyNV, tpm2.TPMCCStartAuthSession, tpm2.TPMCCCreatePrimary} {
		n.Proxy.Inject(tpmtest.Fault{On: code, Do: tpmtest.Code(tpm2.TPMRCLockout)})
		n.Refuses(slot, seal.CauseLockout, "dictionary-attack lockout", "tpm2_dictionarylockout")
	}
	n.Proxy.Heal()
	n.Opens(slot, kek)
}
