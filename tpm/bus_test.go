package tpm_test

import (
	"bytes"
	"context"
	"crypto"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// left counts transient objects and loaded sessions, with a client that, unlike a
// Device, does not flush them first.
func (n *node) left() int {
	n.Helper()
	c, err := net.Dial("unix", strings.TrimPrefix(n.machine.Device(), "unix:"))
	if err != nil {
		n.Fatal(err)
	}
	defer c.Close()
	count := 0
	for _, first := range []uint32{0x80000000, 0x02000000, 0x03000000} {
		r, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: first, PropertyCount: 64}.Execute(plain{c})
		if err != nil {
			n.Fatal(err)
		}
		handles, err := r.CapabilityData.Data.Handles()
		if err != nil {
			n.Fatal(err)
		}
		count += len(handles.Handle)
	}
	return count
}

// flush frees what a fault left. (The next operation would flush it first too.)
func (n *node) flush() { n.must(func(transport.TPM) error { return nil }) }

// sent returns the commands of an operation without faults.
func (n *node) sent(f func() error) []tpmtest.Exchange {
	n.Helper()
	n.flush()
	n.proxy.Forget()
	if err := f(); err != nil {
		n.Fatal(err)
	}
	return n.proxy.Traffic()
}

// operations are the operations on a slot and on a sealed credential.
func (n *node) operations(slot seal.Slot, kek *seal.Secret) map[string]func() error {
	blob := n.sealed(kek)
	return map[string]func() error{
		"SealCredential": func() error {
			_, err := tpm.SealCredential(n.Context(), n.Device, n.Owner, crypto.SHA256, kek)
			return err
		},
		"UnsealCredential": func() error {
			got, err := n.unseal(blob)
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
	kek := n.kek()
	slot := n.wrap(kek)
	for name, f := range n.operations(slot, kek) {
		traffic := n.sent(f)
		if got := n.left(); got != 0 {
			t.Errorf("%s leaves %d handles", name, got)
		}
		for i, e := range traffic {
			if e.Code == tpm2.TPMCCFlushContext || i < 2 { // the first two are the Device's own
				continue
			}
			n.proxy.Inject(tpmtest.Fault{After: i, Times: 1, Do: tpmtest.Code(tpm2.TPMRCFailure)})
			if err := f(); err != nil {
				n.want(err, seal.CauseOf(err))
			} else if e.Code != tpm2.TPMCCReadPublic && e.Code != tpm2.TPMCCCreatePrimary { // there is another way without these
				t.Errorf("%s: that %v fails is no error", name, e.Code)
			}
			if got := n.left(); got != 0 {
				t.Errorf("%s: that %v fails leaves %d handles", name, e.Code, got)
			}
			n.proxy.Heal()
		}
	}
	n.opens(slot, kek)
}

// TestFaultyTPM: a TPM that vanishes, hangs or answers garbage at any command gives an
// error with its cause. The wrapper works again when the TPM does.
func TestFaultyTPM(t *testing.T) {
	n := newNode(t)
	kek := n.kek()
	slot := n.wrap(kek)
	for name, f := range n.operations(slot, kek) {
		for i, e := range n.sent(f) {
			for fault, do := range map[string]tpmtest.Action{"drop": tpmtest.Drop, "truncate": tpmtest.Truncate(9)} {
				n.proxy.Inject(tpmtest.Fault{After: i, Times: 1, Do: do})
				if err := f(); e.Code != tpm2.TPMCCFlushContext || err != nil {
					n.want(err, seal.CauseUnavailable)
				}
				n.proxy.Heal()
				if err := f(); err != nil {
					t.Errorf("%s after %s at %v: %v", name, fault, e.Code, err)
				}
			}
			for garbage, answer := range tpmtest.Garbage() {
				n.proxy.Inject(tpmtest.Fault{After: i, Times: 1, Do: tpmtest.Raw(answer.Answer)})
				if err := f(); err != nil && seal.CauseOf(err) == "" {
					t.Errorf("%s, %s to %v: %v has no cause", name, garbage, e.Code, err)
				}
			}
			n.proxy.Heal()
			n.flush()
		}
	}
	n.opens(slot, kek)
}

// TestHangingTPM: an operation ends with its deadline, no matter at which command the
// TPM hangs.
func TestHangingTPM(t *testing.T) {
	n := newNode(t)
	kek := n.kek()
	slot := n.wrap(kek)
	steps := n.sent(n.operations(slot, kek)["Unwrap"])
	hasty := nodeOn(t, n.machine)
	hasty.Device = hasty.proxy.TPM(400 * time.Millisecond)
	hasty.Wrapper = tpm.NewWrapper(hasty.Config)
	for i, e := range steps {
		hasty.proxy.Inject(tpmtest.Fault{After: i, Times: 1, Do: tpmtest.HangAfter})
		if e.Code == tpm2.TPMCCFlushContext {
			continue // the KEK is here by then
		}
		hasty.refuses(slot, seal.CauseUnavailable, "no answer")
	}
	n.opens(slot, kek)
}

// TestNoKEKCrossesTheBus: neither the KEK nor half of it crosses the bus unencrypted.
func TestNoKEKCrossesTheBus(t *testing.T) {
	n := newNode(t)
	kek := n.kek()
	for _, f := range n.operations(n.wrap(kek), kek) {
		if err := f(); err != nil {
			t.Fatal(err)
		}
	}
	kek.With(func(b []byte) {
		if n.proxy.Saw(b[:16]) || n.proxy.Saw(b[16:]) {
			t.Error("the KEK crossed the bus in plain")
		}
	})
	if n.proxy.Count(tpm2.TPMCCCreate) == 0 || n.proxy.Count(tpm2.TPMCCUnseal) == 0 {
		t.Error("nothing crossed the bus")
	}
}

// TestInterposer: an impostor in the TPM's place, with a storage root key of its own,
// gets no session that carries a key, neither for unsealing nor for a rotation.
func TestInterposer(t *testing.T) {
	n, his := newNode(t), newNode(t)
	kek := n.kek()
	slot := n.wrap(kek)
	mine, theirs := n.srkPoint(), his.srkPoint()
	n.proxy.Forget()
	n.proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCCreatePrimary, Do: tpmtest.Change(func(response []byte) []byte {
		return bytes.Replace(response, mine, theirs, 1)
	})})
	n.refuses(slot, seal.CauseTPMCleared)
	if _, err := n.WrapLike(t.Context(), kek, slot); err == nil {
		t.Error("a KEK was sealed to the interposer's key")
	}
	if n.proxy.Count(tpm2.TPMCCStartAuthSession)+n.proxy.Count(tpm2.TPMCCCreate)+n.proxy.Count(tpm2.TPMCCUnseal) != 0 {
		t.Error("a session with the interposer was started")
	}
	n.proxy.Heal()
	n.opens(slot, kek)
}

// srkPoint is the TPM's storage root key, as it stands in a public area.
func (n *node) srkPoint() (point []byte) {
	n.Helper()
	n.must(func(tp transport.TPM) error {
		return tpm.WithSRK(tp, tpm.Owner{}, nil, func(srk *tpm.SRK) error {
			p, err := srk.Public.Unique.ECC()
			if err == nil {
				point = tpm2.Marshal(p)
			}
			return err
		})
	})
	return point
}

// persist makes a primary key of the owner hierarchy persistent at 0x81000001.
func (n *node) persist(template tpm2.TPMTPublic) []byte {
	n.Helper()
	const handle = tpm2.TPMHandle(0x81000001)
	var name []byte
	n.must(func(tp transport.TPM) error {
		if r, err := (tpm2.ReadPublic{ObjectHandle: handle}).Execute(tp); err == nil {
			old := tpm2.NamedHandle{Handle: handle, Name: r.Name}
			if _, err := (tpm2.EvictControl{Auth: ownerHandle(), ObjectHandle: old, PersistentHandle: handle}).Execute(tp); err != nil {
				return err
			}
		}
		r, err := tpm2.CreatePrimary{PrimaryHandle: ownerHandle(), InPublic: tpm2.New2B(template)}.Execute(tp)
		if err != nil {
			return err
		}
		name = r.Name.Buffer
		_, err = tpm2.EvictControl{Auth: ownerHandle(), ObjectHandle: tpm2.NamedHandle{Handle: r.ObjectHandle, Name: r.Name}, PersistentHandle: handle}.Execute(tp)
		return err
	})
	return name
}

// TestPersistentKey: kleidi neither uses nor touches somebody else's key at 0x81000001.
// It uses the right key there, and makes no other.
func TestPersistentKey(t *testing.T) {
	n := newNode(t)
	kek := n.kek()
	slot := n.wrap(kek)
	foreign := tpm2.ECCSRKTemplate
	foreign.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{X: tpm2.TPM2BECCParameter{Buffer: bytes.Repeat([]byte{1}, 32)}, Y: tpm2.TPM2BECCParameter{Buffer: make([]byte, 32)}})
	name := n.persist(foreign)
	n.proxy.Forget()
	n.opens(slot, kek)
	n.opens(n.wrap(kek), kek)
	if n.proxy.Count(tpm2.TPMCCEvictControl) != 0 {
		t.Error("a persistent handle was touched")
	}
	n.must(func(tp transport.TPM) error {
		r, err := tpm2.ReadPublic{ObjectHandle: tpm2.TPMHandle(0x81000001)}.Execute(tp)
		if err == nil && !bytes.Equal(r.Name.Buffer, name) {
			t.Error("the foreign key is another one now")
		}
		return err
	})
	n.persist(tpm2.ECCSRKTemplate)
	n.proxy.Forget()
	n.opens(slot, kek)
	if made := n.proxy.Count(tpm2.TPMCCCreatePrimary); made != 0 {
		t.Errorf("%d keys were made though the right one is there", made)
	}
	if n.left() != 0 {
		t.Error("a handle is left")
	}
}

// TestOwnerAuthorization: with a value on the owner hierarchy, the wrapper needs that
// value from the file, or the persistent key to open existing slots.
func TestOwnerAuthorization(t *testing.T) {
	n := newNode(t)
	kek := n.kek()
	slot := n.wrap(kek)
	n.persist(tpm2.ECCSRKTemplate)
	const secret = "correct horse battery staple"
	n.must(func(tp transport.TPM) error {
		_, err := tpm2.HierarchyChangeAuth{AuthHandle: ownerHandle(), NewAuth: tpm2.TPM2BAuth{Buffer: []byte(secret)}}.Execute(tp)
		return err
	})
	// All operations of a start: the gate, the slot, and settling a settled epoch.
	n.gate.Node = "alpha"
	if err := n.gate.Attest(t.Context(), []seal.Slot{slot}); err != nil || !n.gate.Passed() {
		t.Errorf("the gate, without the value: %v", err)
	}
	n.opens(slot, kek)
	if err := n.Settle(t.Context(), []seal.Slot{slot}); err != nil {
		t.Errorf("settling, without the value: %v", err)
	}
	_, err := n.Wrap(t.Context(), kek)
	n.want(err, seal.CauseCredentials, "tpm.ownerAuthFile")
	file := filepath.Join(t.TempDir(), "owner")
	if err := os.WriteFile(file, []byte(secret+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	with := nodeOn(t, n.machine, func(c *tpm.Config) { c.Owner = tpm.Owner{File: file} })
	next, err := with.ForNextEpoch(nil).Wrap(t.Context(), kek)
	if err != nil {
		t.Fatal(err)
	}
	n.want(n.Settle(t.Context(), []seal.Slot{next}), seal.CauseCredentials, "tpm.ownerAuthFile")
	if err := with.Settle(t.Context(), []seal.Slot{next}); err != nil {
		t.Fatal(err)
	}
	with.opens(next, kek)
	with.refuses(slot, seal.CauseEpoch)
	if with.proxy.Saw([]byte(secret)) {
		t.Error("the owner authorization crossed the bus in plain")
	}
}

// TestOwnerSessionsAreSalted: whoever listens must not be able to try values of the owner
// authorization against the HMAC of a session. tpmKey is the first handle of
// TPM2_StartAuthSession, TPM_RH_NULL where there is no salt.
func TestOwnerSessionsAreSalted(t *testing.T) {
	n := newNode(t)
	const secret = "letmein"
	n.must(func(tp transport.TPM) error {
		_, err := tpm2.HierarchyChangeAuth{AuthHandle: ownerHandle(), NewAuth: tpm2.TPM2BAuth{Buffer: []byte(secret)}}.Execute(tp)
		return err
	})
	file := filepath.Join(t.TempDir(), "owner")
	if err := os.WriteFile(file, []byte(secret+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	with := nodeOn(t, n.machine, func(c *tpm.Config) { c.Owner = tpm.Owner{File: file} })
	sessions := 0
	with.proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCStartAuthSession, Times: 100, Do: func(command []byte, send func() []byte) []byte {
		sessions++
		if tpm2.TPMHandle(binary.BigEndian.Uint32(command[10:])) == tpm2.TPMRHNull {
			t.Error("a session without a salt")
		}
		return send()
	}})
	kek := with.kek()
	slot := with.wrap(kek)
	with.opens(slot, kek)
	if sessions == 0 {
		t.Error("no session was seen")
	}
	if err := os.Chmod(file, 0o666); err != nil {
		t.Fatal(err)
	}
	_, err := with.Wrap(t.Context(), kek)
	with.want(err, seal.CauseCredentials, "has mode 0666, so others can change it; chmod go-w "+file)
}

// extendFirst makes the TPM extend PCR 10 before it executes the command.
func extendFirst(command []byte, send func() []byte) []byte {
	wanted := bytes.Clone(command)
	event := binary.BigEndian.AppendUint16(nil, uint16(tpm2.TPMSTSessions))
	event = binary.BigEndian.AppendUint32(event, uint32(len(command)))
	event = binary.BigEndian.AppendUint32(event, uint32(tpm2.TPMCCPCREvent))
	event = append(event, 0, 0, 0, 10, 0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0) // the PCR, and an empty password
	event = binary.BigEndian.AppendUint16(event, uint16(len(command)-len(event)-2))
	copy(command, append(event, make([]byte, len(command)-len(event))...)) // send sends what is in command
	if r := send(); len(r) < 10 || !bytes.Equal(r[6:10], make([]byte, 4)) {
		return nil
	}
	copy(command, wanted)
	return send()
}

// TestPCRExtendedMeanwhile: a PCR that the slot does not name, for instance IMA's, is
// extended between the authorization policy and the unsealing, or between reading PCRs
// and quoting them. kleidi tries again, but not for ever.
func TestPCRExtendedMeanwhile(t *testing.T) {
	n := newNode(t)
	kek := n.kek()
	slot := n.wrap(kek)
	for _, times := range []int{1, 3, 7} {
		n.proxy.Forget()
		n.proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCUnseal, Times: times, Do: extendFirst})
		n.opens(slot, kek)
		if got := n.proxy.Count(tpm2.TPMCCUnseal); got != times+1 {
			t.Errorf("%d times extended: %d tries", times, got)
		}
	}
	n.proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCUnseal, Do: extendFirst})
	if err := n.refuses(slot, seal.CauseUnavailable); !errors.Is(err, tpm2.TPMRCPCRChanged) {
		t.Errorf("%v hides the response code", err)
	}
	n.proxy.Heal()
	if n.left() != 0 {
		t.Error("a handle is left")
	}
	n.opens(slot, kek)
}

// TestManyOperations: after many operations the wrapper holds nothing.
func TestManyOperations(t *testing.T) {
	n := newNode(t)
	kek := n.kek()
	state, err := n.gate.State(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n.State = func(context.Context) (tpm.BootState, error) { return state, nil }
	n.opens(n.wrap(kek), kek)
	before, goroutines := files(t), runtime.NumGoroutine()
	for range 200 {
		n.opens(n.wrap(kek), kek)
	}
	for deadline := time.Now().Add(10 * time.Second); files(t) > before || runtime.NumGoroutine() > goroutines; runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("%d files and %d goroutines, before %d and %d", files(t), runtime.NumGoroutine(), before, goroutines)
		}
	}
	if n.left() != 0 {
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
