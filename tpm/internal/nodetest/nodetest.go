// Package nodetest is a node for the tests of package tpm and of those below it: a
// simulated machine with the TPM wrapper.
package nodetest

import (
	"bytes"
	"context"
	"crypto"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/nv"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// Node is a machine with the TPM wrapper behind a proxy, configured as in kleidi: it
// seals to an attested boot state.
type Node struct {
	*testing.T
	Machine *tpmtest.Machine
	Proxy   *tpmtest.Proxy
	Gate    *attest.Gate
	*tpm.Wrapper
}

// New returns a node that has an epoch counter.
func New(t *testing.T, change ...func(*tpm.Config)) *Node {
	t.Helper()
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	n := On(t, m, change...)
	if _, err := n.Provision(t.Context()); err != nil {
		t.Fatal(err)
	}
	return n
}

// On is New on a given machine, without an epoch counter.
func On(t *testing.T, m *tpmtest.Machine, change ...func(*tpm.Config)) *Node {
	t.Helper()
	n := &Node{T: t, Machine: m, Proxy: tpmtest.NewProxy(t, m)}
	c := tpm.Config{Device: n.Proxy.TPM(2 * time.Minute), Node: "alpha", State: func(ctx context.Context) (tpm.BootState, error) { return n.Gate.State(ctx) }}
	for _, f := range change {
		f(&c)
	}
	counter, err := nv.NewCounter(nv.DefaultEpochIndex, c.Owner)
	if err != nil {
		t.Fatal(err)
	}
	c.Counter = counter
	n.Gate = &attest.Gate{Attester: attest.Attester{Device: c.Device, Owner: c.Owner,
		Logs: attest.Logs{Firmware: m.EventLog(), Userspace: m.UserspaceLog()}}, Counter: counter, Bank: crypto.SHA256}
	n.Wrapper = tpm.NewWrapper(c)
	return n
}

// KEK returns a random KEK, which the end of the test closes.
func (n *Node) KEK() *seal.Secret {
	n.Helper()
	kek, err := n.Memory.NewKEK()
	if err != nil {
		n.Fatal(err)
	}
	n.Cleanup(func() { kek.Close() })
	return kek
}

// Sealed returns a slot with kek.
func (n *Node) Sealed(kek *seal.Secret) seal.Slot {
	n.Helper()
	slot, err := n.Wrap(n.Context(), kek)
	if err != nil {
		n.Fatalf("Wrap: %v", err)
	}
	return slot
}

// Opens demands that a slot opens to kek.
func (n *Node) Opens(slot seal.Slot, kek *seal.Secret) {
	n.Helper()
	got, err := n.Unwrap(n.Context(), slot)
	if err != nil {
		n.Errorf("Unwrap: %v", err)
		return
	}
	defer got.Close()
	if !got.Equal(kek) {
		n.Error("the slot opens to another KEK")
	}
}

// Refuses demands that a slot does not open, with this cause, a hint and these words.
// It returns the error.
func (n *Node) Refuses(slot seal.Slot, cause seal.Cause, words ...string) error {
	n.Helper()
	got, err := n.Unwrap(n.Context(), slot)
	if err == nil {
		got.Close()
		n.Errorf("the slot opens, want %q", cause)
		return nil
	}
	n.Want(err, cause, words...)
	return err
}

// Want demands an error of this cause, with a hint and these words.
func (n *Node) Want(err error, cause seal.Cause, words ...string) {
	n.Helper()
	e, ok := errors.AsType[*seal.Error](err)
	if !ok || e.Cause != cause || e.Hint == "" {
		n.Errorf("%v: cause %q, want %q and a hint", err, seal.CauseOf(err), cause)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			n.Errorf("%q does not say %q", err, w)
		}
	}
}

// Must runs commands that are not part of the test.
func (n *Node) Must(f func(transport.TPM) error) {
	n.Helper()
	if err := n.Machine.TPM().Do(n.Context(), f); err != nil {
		n.Fatal(err)
	}
}

// OwnerHandle is the owner hierarchy, whose authorization value is empty.
func OwnerHandle() tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Name: tpm2.HandleName(tpm2.TPMRHOwner), Auth: tpm2.PasswordAuth(nil)}
}

// LockOut guesses an object's authorization until the TPM locks out.
func LockOut(t transport.TPM) error {
	// TPM2_DictionaryAttackParameters, which go-tpm lacks: two tries, an hour each.
	r0, err := t.Send([]byte{0x80, 2, 0, 0, 0, 39, 0, 0, 1, 0x3a, 0x40, 0, 0, 0x0a, 0, 0, 0, 9, 0x40, 0, 0, 9, 0, 0, 0, 0, 0,
		0, 0, 0, 2, 0, 0, 0x0e, 0x10, 0, 0, 0x0e, 0x10})
	if err != nil || !bytes.Equal(r0[6:10], make([]byte, 4)) {
		return fmt.Errorf("TPM2_DictionaryAttackParameters: %x, %w", r0, err)
	}
	template := tpm2.ECCSRKTemplate
	template.ObjectAttributes.NoDA = false
	r, err := tpm2.CreatePrimary{PrimaryHandle: OwnerHandle(), InPublic: tpm2.New2B(template),
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

// ExtendFirst makes the TPM extend PCR 10 before it executes the command.
func ExtendFirst(command []byte, send func() []byte) []byte {
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

// Plain is a client that does not clean up.
type Plain struct{ net.Conn }

// Send implements transport.TPM.
func (p Plain) Send(command []byte) ([]byte, error) {
	if _, err := p.Write(command); err != nil {
		return nil, err
	}
	b := make([]byte, 4096)
	n, err := p.Read(b)
	return b[:n], err
}

// Left counts transient objects and loaded sessions, with a client that, unlike a
// Device, does not flush them first.
func (n *Node) Left() int {
	n.Helper()
	c, err := net.Dial("unix", strings.TrimPrefix(n.Machine.Device(), "unix:"))
	if err != nil {
		n.Fatal(err)
	}
	defer c.Close()
	count := 0
	for _, first := range []uint32{0x80000000, 0x02000000, 0x03000000} {
		r, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: first, PropertyCount: 64}.Execute(Plain{c})
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

// SRKPoint is the TPM's storage root key, as it stands in a public area.
func (n *Node) SRKPoint() (point []byte) {
	n.Helper()
	n.Must(func(tp transport.TPM) error {
		return keys.WithSRK(tp, keys.Owner{}, nil, func(srk *keys.SRK) error {
			p, err := srk.Public.Unique.ECC()
			if err == nil {
				point = tpm2.Marshal(p)
			}
			return err
		})
	})
	return point
}
