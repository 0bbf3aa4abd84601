package tpm_test

import (
	"bytes"
	"context"
	"crypto"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/credential"
	"github.com/beezy-dev/kleidi/tpm/internal/nodetest"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// flush frees what a fault left. (The next operation would flush it first too.)
func (n *node) flush() { n.Must(func(transport.TPM) error { return nil }) }

// sent returns the commands of an operation without faults.
func (n *node) sent(f func() error) []tpmtest.Exchange {
	n.Helper()
	n.flush()
	n.Proxy.Forget()
	if err := f(); err != nil {
		n.Fatal(err)
	}
	return n.Proxy.Traffic()
}

// operations are the operations on a slot and on a sealed credential.
func (n *node) operations(slot seal.Slot, kek *seal.Secret) map[string]func() error {
	blob, err := credential.Seal(n.Context(), n.Device, n.Owner, crypto.SHA256, kek)
	if err != nil {
		n.Fatal(err)
	}
	return map[string]func() error{
		"credential.Seal": func() error {
			_, err := credential.Seal(n.Context(), n.Device, n.Owner, crypto.SHA256, kek)
			return err
		},
		"credential.Unseal": func() error {
			got, err := credential.Unseal(n.Context(), n.Device, n.Owner, n.Memory, blob)
			if err == nil {
				got.Close()
			}
			return err
		},
		"Wrap":     func() error { _, err := n.Wrap(n.Context(), kek); return err },
		"WrapLike": func() error { _, err := n.WrapLike(n.Context(), kek, slot); return err },
		"Unwrap": func() error {
			got, err := n.Unwrap(n.Context(), slot)
			if err == nil {
				got.Close()
			}
			return err
		},
		"Provision": func() error { _, err := n.Provision(n.Context()); return err },
		"Settle":    func() error { return n.Settle(n.Context(), []seal.Slot{slot}) },
	}
}

// TestNoHandleIsLeft: after success, and after any command was refused.
func TestNoHandleIsLeft(t *testing.T) {
	n := newNode(t)
	kek := n.KEK()
	slot := n.Sealed(kek)
	for name, f := range n.operations(slot, kek) {
		traffic := n.sent(f)
		if got := n.Left(); got != 0 {
			t.Errorf("%s leaves %d handles", name, got)
		}
		for i, e := range traffic {
			if e.Code == tpm2.TPMCCFlushContext || i < 2 { // the first two are the Device's own
				continue
			}
			n.Proxy.Inject(tpmtest.Fault{After: i, Times: 1, Do: tpmtest.Code(tpm2.TPMRCFailure)})
			if err := f(); err != nil {
				n.Want(err, seal.CauseOf(err))
			} else if e.Code != tpm2.TPMCCReadPublic && e.Code != tpm2.TPMCCCreatePrimary { // there is another way without these
				t.Errorf("%s: that %v fails is no error", name, e.Code)
			}
			if got := n.Left(); got != 0 {
				t.Errorf("%s: that %v fails leaves %d handles", name, e.Code, got)
			}
			n.Proxy.Heal()
		}
	}
	n.Opens(slot, kek)
}

// TestFaultyTPM: a TPM that vanishes, hangs or answers garbage at any command gives an
// error with its cause. The wrapper works again when the TPM does.
func TestFaultyTPM(t *testing.T) {
	n := newNode(t)
	kek := n.KEK()
	slot := n.Sealed(kek)
	for name, f := range n.operations(slot, kek) {
		for i, e := range n.sent(f) {
			for fault, do := range map[string]tpmtest.Action{"drop": tpmtest.Drop, "truncate": tpmtest.Truncate(9)} {
				n.Proxy.Inject(tpmtest.Fault{After: i, Times: 1, Do: do})
				if err := f(); e.Code != tpm2.TPMCCFlushContext || err != nil {
					n.Want(err, seal.CauseUnavailable)
				}
				n.Proxy.Heal()
				if err := f(); err != nil {
					t.Errorf("%s after %s at %v: %v", name, fault, e.Code, err)
				}
			}
			for garbage, answer := range tpmtest.Garbage() {
				n.Proxy.Inject(tpmtest.Fault{After: i, Times: 1, Do: tpmtest.Raw(answer.Answer)})
				if err := f(); err != nil && seal.CauseOf(err) == "" {
					t.Errorf("%s, %s to %v: %v has no cause", name, garbage, e.Code, err)
				}
			}
			n.Proxy.Heal()
			n.flush()
		}
	}
	n.Opens(slot, kek)
}

// TestHangingTPM: an operation ends with its deadline, no matter at which command the
// TPM hangs.
func TestHangingTPM(t *testing.T) {
	n := newNode(t)
	kek := n.KEK()
	slot := n.Sealed(kek)
	steps := n.sent(n.operations(slot, kek)["Unwrap"])
	hasty := nodeOn(t, n.Machine)
	hasty.Device = hasty.Proxy.TPM(400 * time.Millisecond)
	hasty.Wrapper = tpm.NewWrapper(hasty.Config)
	for i, e := range steps {
		hasty.Proxy.Inject(tpmtest.Fault{After: i, Times: 1, Do: tpmtest.HangAfter})
		if e.Code == tpm2.TPMCCFlushContext {
			continue // the KEK is here by then
		}
		hasty.Refuses(slot, seal.CauseUnavailable, "deadline exceeded")
	}
	n.Opens(slot, kek)
}

// TestNoKEKCrossesTheBus: neither the KEK nor half of it crosses the bus unencrypted.
func TestNoKEKCrossesTheBus(t *testing.T) {
	n := newNode(t)
	kek := n.KEK()
	for _, f := range n.operations(n.Sealed(kek), kek) {
		if err := f(); err != nil {
			t.Fatal(err)
		}
	}
	kek.With(func(b []byte) {
		if n.Proxy.Saw(b[:16]) || n.Proxy.Saw(b[16:]) {
			t.Error("the KEK crossed the bus in plain")
		}
	})
	if n.Proxy.Count(tpm2.TPMCCCreate) == 0 || n.Proxy.Count(tpm2.TPMCCUnseal) == 0 {
		t.Error("nothing crossed the bus")
	}
}

// TestInterposer: an impostor in the TPM's place, with a storage root key of its own,
// gets no session that carries a key, neither for unsealing nor for a rotation.
func TestInterposer(t *testing.T) {
	n, his := newNode(t), newNode(t)
	kek := n.KEK()
	slot := n.Sealed(kek)
	mine, theirs := n.SRKPoint(), his.SRKPoint()
	n.Proxy.Forget()
	n.Proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCCreatePrimary, Do: tpmtest.Change(func(response []byte) []byte {
		return bytes.Replace(response, mine, theirs, 1)
	})})
	n.Refuses(slot, seal.CauseTPMCleared)
	if _, err := n.WrapLike(t.Context(), kek, slot); err == nil {
		t.Error("a KEK was sealed to the interposer's key")
	}
	if n.Proxy.Count(tpm2.TPMCCStartAuthSession)+n.Proxy.Count(tpm2.TPMCCCreate)+n.Proxy.Count(tpm2.TPMCCUnseal) != 0 {
		t.Error("a session with the interposer was started")
	}
	n.Proxy.Heal()
	n.Opens(slot, kek)
}

// persist makes a primary key of the owner hierarchy persistent at 0x81000001.
func (n *node) persist(template tpm2.TPMTPublic) []byte {
	n.Helper()
	const handle = tpm2.TPMHandle(0x81000001)
	var name []byte
	n.Must(func(tp transport.TPM) error {
		if r, err := (tpm2.ReadPublic{ObjectHandle: handle}).Execute(tp); err == nil {
			old := tpm2.NamedHandle{Handle: handle, Name: r.Name}
			if _, err := (tpm2.EvictControl{Auth: nodetest.OwnerHandle(), ObjectHandle: old, PersistentHandle: handle}).Execute(tp); err != nil {
				return err
			}
		}
		r, err := tpm2.CreatePrimary{PrimaryHandle: nodetest.OwnerHandle(), InPublic: tpm2.New2B(template)}.Execute(tp)
		if err != nil {
			return err
		}
		name = r.Name.Buffer
		_, err = tpm2.EvictControl{Auth: nodetest.OwnerHandle(), ObjectHandle: tpm2.NamedHandle{Handle: r.ObjectHandle, Name: r.Name}, PersistentHandle: handle}.Execute(tp)
		return err
	})
	return name
}

// TestPersistentKey: kleidi neither uses nor touches somebody else's key at 0x81000001.
// It uses the right key there, and makes no other.
func TestPersistentKey(t *testing.T) {
	n := newNode(t)
	kek := n.KEK()
	slot := n.Sealed(kek)
	foreign := tpm2.ECCSRKTemplate
	foreign.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{X: tpm2.TPM2BECCParameter{Buffer: bytes.Repeat([]byte{1}, 32)}, Y: tpm2.TPM2BECCParameter{Buffer: make([]byte, 32)}})
	name := n.persist(foreign)
	n.Proxy.Forget()
	n.Opens(slot, kek)
	n.Opens(n.Sealed(kek), kek)
	if n.Proxy.Count(tpm2.TPMCCEvictControl) != 0 {
		t.Error("a persistent handle was touched")
	}
	n.Must(func(tp transport.TPM) error {
		r, err := tpm2.ReadPublic{ObjectHandle: tpm2.TPMHandle(0x81000001)}.Execute(tp)
		if err == nil && !bytes.Equal(r.Name.Buffer, name) {
			t.Error("the foreign key is another one now")
		}
		return err
	})
	n.persist(tpm2.ECCSRKTemplate)
	n.Proxy.Forget()
	n.Opens(slot, kek)
	if made := n.Proxy.Count(tpm2.TPMCCCreatePrimary); made != 0 {
		t.Errorf("%d keys were made though the right one is there", made)
	}
	if n.Left() != 0 {
		t.Error("a handle is left")
	}
}

// TestOwnerAuthorization: with a value on the owner hierarchy, the wrapper needs that
// value from the file, or the persistent key to open existing slots.
func TestOwnerAuthorization(t *testing.T) {
	n := newNode(t)
	kek := n.KEK()
	slot := n.Sealed(kek)
	n.persist(tpm2.ECCSRKTemplate)
	const secret = "correct horse battery staple"
	n.Must(func(tp transport.TPM) error {
		_, err := tpm2.HierarchyChangeAuth{AuthHandle: nodetest.OwnerHandle(), NewAuth: tpm2.TPM2BAuth{Buffer: []byte(secret)}}.Execute(tp)
		return err
	})
	// All operations of a start: the gate, the slot, and settling a settled epoch.
	n.Gate.Node = "alpha"
	if err := n.Gate.Attest(t.Context(), []seal.Slot{slot}); err != nil || !n.Gate.Passed() {
		t.Errorf("the gate, without the value: %v", err)
	}
	n.Opens(slot, kek)
	if err := n.Settle(t.Context(), []seal.Slot{slot}); err != nil {
		t.Errorf("settling, without the value: %v", err)
	}
	_, err := n.Wrap(t.Context(), kek)
	n.Want(err, seal.CauseCredentials, "tpm.ownerAuthFile")
	file := filepath.Join(t.TempDir(), "owner")
	if err := os.WriteFile(file, []byte(secret+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	with := nodeOn(t, n.Machine, func(c *tpm.Config) { c.Owner = keys.Owner{File: file} })
	next, err := with.ForNextEpoch(nil).Wrap(t.Context(), kek)
	if err != nil {
		t.Fatal(err)
	}
	n.Want(n.Settle(t.Context(), []seal.Slot{next}), seal.CauseCredentials, "tpm.ownerAuthFile")
	if err := with.Settle(t.Context(), []seal.Slot{next}); err != nil {
		t.Fatal(err)
	}
	with.Opens(next, kek)
	with.Refuses(slot, seal.CauseEpoch)
	if with.Proxy.Saw([]byte(secret)) {
		t.Error("the owner authorization crossed the bus in plain")
	}
}

// TestOwnerSessionsAreSalted: whoever listens must not be able to try values of the owner
// authorization against the HMAC of a session. tpmKey is the first handle of
// TPM2_StartAuthSession, TPM_RH_NULL where there is no salt.
func TestOwnerSessionsAreSalted(t *testing.T) {
	n := newNode(t)
	const secret = "letmein"
	n.Must(func(tp transport.TPM) error {
		_, err := tpm2.HierarchyChangeAuth{AuthHandle: nodetest.OwnerHandle(), NewAuth: tpm2.TPM2BAuth{Buffer: []byte(secret)}}.Execute(tp)
		return err
	})
	file := filepath.Join(t.TempDir(), "owner")
	if err := os.WriteFile(file, []byte(secret+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	with := nodeOn(t, n.Machine, func(c *tpm.Config) { c.Owner = keys.Owner{File: file} })
	sessions := 0
	with.Proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCStartAuthSession, Times: 100, Do: func(command []byte, send func() []byte) []byte {
		sessions++
		if tpm2.TPMHandle(binary.BigEndian.Uint32(command[10:])) == tpm2.TPMRHNull {
			t.Error("a session without a salt")
		}
		return send()
	}})
	kek := with.KEK()
	slot := with.Sealed(kek)
	with.Opens(slot, kek)
	if sessions == 0 {
		t.Error("no session was seen")
	}
	if err := os.Chmod(file, 0o666); err != nil {
		t.Fatal(err)
	}
	_, err := with.Wrap(t.Context(), kek)
	with.Want(err, seal.CauseCredentials, "has mode 0666, so others can change it; chmod go-w "+file)
}

// TestPCRExtendedMeanwhile: a PCR that the slot does not name, for instance IMA's, is
// extended between the authorization policy and the unsealing, or between reading PCRs
// and quoting them. kleidi tries again, but not for ever.
func TestPCRExtendedMeanwhile(t *testing.T) {
	n := newNode(t)
	kek := n.KEK()
	slot := n.Sealed(kek)
	for _, times := range []int{1, 3, 7} {
		n.Proxy.Forget()
		n.Proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCUnseal, Times: times, Do: nodetest.ExtendFirst})
		n.Opens(slot, kek)
		if got := n.Proxy.Count(tpm2.TPMCCUnseal); got != times+1 {
			t.Errorf("%d times extended: %d tries", times, got)
		}
	}
	n.Proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCUnseal, Do: nodetest.ExtendFirst})
	if err := n.Refuses(slot, seal.CauseUnavailable); !errors.Is(err, tpm2.TPMRCPCRChanged) {
		t.Errorf("%v hides the response code", err)
	}
	n.Proxy.Heal()
	if n.Left() != 0 {
		t.Error("a handle is left")
	}
	n.Opens(slot, kek)
}

// TestManyOperations: after many operations the wrapper holds nothing.
func TestManyOperations(t *testing.T) {
	n := newNode(t)
	kek := n.KEK()
	state, err := n.Gate.State(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n.State = func(context.Context) (tpm.BootState, error) { return state, nil }
	n.Opens(n.Sealed(kek), kek)
	before, goroutines := files(t), runtime.NumGoroutine()
	for range 200 {
		n.Opens(n.Sealed(kek), kek)
	}
	for deadline := time.Now().Add(2 * time.Minute); files(t) > before || runtime.NumGoroutine() > goroutines; runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("%d files and %d goroutines, before %d and %d", files(t), runtime.NumGoroutine(), before, goroutines)
		}
	}
	if n.Left() != 0 {
		t.Error("a handle is left")
	}
}

func files(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}
