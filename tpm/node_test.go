package tpm_test

import (
	"context"
	"crypto"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/nv"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// node is a machine with the TPM wrapper behind a proxy, configured as in kleidi: it
// seals to an attested boot state.
type node struct {
	*testing.T
	machine *tpmtest.Machine
	proxy   *tpmtest.Proxy
	counter *nv.Counter
	gate    *attest.Gate
	*tpm.Wrapper
}

// newNode returns a node that has an epoch counter.
func newNode(t *testing.T, change ...func(*tpm.Config)) *node {
	t.Helper()
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	n := nodeOn(t, m, change...)
	if _, err := n.Provision(t.Context()); err != nil {
		t.Fatal(err)
	}
	return n
}

func nodeOn(t *testing.T, m *tpmtest.Machine, change ...func(*tpm.Config)) *node {
	t.Helper()
	n := &node{T: t, machine: m, proxy: tpmtest.NewProxy(t, m)}
	c := tpm.Config{Device: n.proxy.TPM(10 * time.Second), Node: "alpha", State: func(ctx context.Context) (tpm.BootState, error) { return n.gate.State(ctx) }}
	for _, f := range change {
		f(&c)
	}
	var err error
	if n.counter, err = nv.NewCounter(nv.DefaultEpochIndex, c.Owner); err != nil {
		t.Fatal(err)
	}
	c.Counter = n.counter
	n.gate = &attest.Gate{Attester: attest.Attester{Device: c.Device, Owner: c.Owner,
		Logs: attest.Logs{Firmware: m.EventLog(), Userspace: m.UserspaceLog()}}, Counter: n.counter, Bank: crypto.SHA256}
	n.Wrapper = tpm.NewWrapper(c)
	return n
}

func (n *node) kek() *seal.Secret {
	n.Helper()
	kek, err := n.Memory.NewKEK()
	if err != nil {
		n.Fatal(err)
	}
	n.Cleanup(func() { kek.Close() })
	return kek
}

func (n *node) wrap(kek *seal.Secret) seal.Slot {
	n.Helper()
	slot, err := n.Wrap(n.Context(), kek)
	if err != nil {
		n.Fatalf("Wrap: %v", err)
	}
	return slot
}

// opens demands that a slot opens to kek.
func (n *node) opens(slot seal.Slot, kek *seal.Secret) {
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

// refuses demands that a slot does not open, with this cause, a hint and these words.
// It returns the error.
func (n *node) refuses(slot seal.Slot, cause seal.Cause, words ...string) error {
	n.Helper()
	got, err := n.Unwrap(n.Context(), slot)
	if err == nil {
		got.Close()
		n.Errorf("the slot opens, want %q", cause)
		return nil
	}
	n.want(err, cause, words...)
	return err
}

func (n *node) want(err error, cause seal.Cause, words ...string) {
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

// must runs commands that are not part of the test.
func (n *node) must(f func(transport.TPM) error) {
	n.Helper()
	if err := n.machine.TPM().Do(n.Context(), f); err != nil {
		n.Fatal(err)
	}
}

func ownerHandle() tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Name: tpm2.HandleName(tpm2.TPMRHOwner), Auth: tpm2.PasswordAuth(nil)}
}

// ForNextEpoch returns a wrapper that seals for the next epoch, after the epochs of
// revoke.
func (n *node) ForNextEpoch(revoke []seal.Slot) *tpm.Wrapper {
	n.Helper()
	w, err := n.With(tpm.SealOptions{NextEpoch: true, Revoke: revoke})
	if err != nil {
		n.Fatal(err)
	}
	return w
}
