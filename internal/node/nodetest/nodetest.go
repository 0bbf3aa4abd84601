// Package nodetest puts machines together for tests of the packages that work on a node.
// Nothing here asks a TPM. Tests of the TPM make a machine with tpm/tpmtest, see OnTPM.
package nodetest

import (
	"bytes"
	"log/slog"
	"path/filepath"
	"testing"

	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/recovery"
	"github.com/beezy-dev/kleidi/seal/unlock"
)

// New returns the machine cp-1 with the default configuration, amended. Its state folder
// does not exist yet. The machine is closed when the test ends.
func New(t testing.TB, amend ...func(*config.Config)) *node.Node {
	t.Helper()
	cfg := config.Default()
	cfg.Node, cfg.State.Dir = "cp-1", filepath.Join(t.TempDir(), "state")
	for _, change := range amend {
		change(cfg)
	}
	n, err := node.New(cfg, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.Close)
	return n
}

// Again returns a machine as another process, or a start of kleidi, has it: with the same
// configuration and state folder, without the lock on the folder, and locked. Close the
// first one before the second one opens the keyring.
func Again(t testing.TB, n *node.Node) *node.Node {
	t.Helper()
	return New(t, func(c *config.Config) { *c = *n.Config })
}

// Restarted closes a machine, and returns it as kleidi has it after a start: locked.
func Restarted(t testing.TB, n *node.Node) *node.Node {
	t.Helper()
	n.Close()
	return Again(t, n)
}

// Named is an amendment: the machine's name.
func Named(name string) func(*config.Config) { return func(c *config.Config) { c.Node = name } }

// Opens is an amendment: these wrappers, none of them the TPM's, open the keyring without
// attestation. No backend is configured for them.
func Opens(kinds ...string) func(*config.Config) {
	return func(c *config.Config) { c.Unlock.Order, c.Unlock.RequireAttestation = kinds, false }
}

// Holding returns a machine without a TPM that holds k open as its own.
func Holding(t testing.TB, name string, k *keyring.Keyring, amend ...func(*config.Config)) *node.Node {
	t.Helper()
	n := New(t, append([]func(*config.Config){Named(name), Opens(seal.TypePKCS11)}, amend...)...)
	Hold(t, n, k)
	return n
}

// Hold makes a machine hold k open as its own, and stores k.
func Hold(t testing.TB, n *node.Node, k *keyring.Keyring) {
	t.Helper()
	if k.Format() > 1 { // a keyring of format 1 is of one node
		own, err := k.OnNode(n.Config.Node, nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		k = own
	}
	if err := n.Unlocker.Adopt(t.Context(), "", unlock.Opener{}, k, []*keyring.Keyring{k}); err != nil {
		t.Fatal(err)
	}
}

// OnTPM is an amendment: the machine has the TPM and the event logs of a simulated one, for
// instance of tpm/tpmtest.
func OnTPM(m interface {
	Device() string
	EventLog() string
	UserspaceLog() string
}) func(*config.Config) {
	return func(c *config.Config) {
		c.TPM.Device, c.TPM.EventLog, c.TPM.UserspaceEventLog = m.Device(), m.EventLog(), m.UserspaceLog()
	}
}

// Identity returns a recovery identity and its public key.
func Identity(t testing.TB) (identity []byte, recipient string) {
	t.Helper()
	secret, recipient, err := recovery.GenerateIdentity(seal.Memory{})
	if err != nil {
		t.Fatal(err)
	}
	defer secret.Close()
	secret.With(func(b []byte) { identity = bytes.Clone(b) })
	return identity, recipient
}
