package tpm_test

import (
	"testing"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/internal/nodetest"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// node is [nodetest.Node] with what only these tests do.
type node struct{ *nodetest.Node }

func newNode(t *testing.T, change ...func(*tpm.Config)) *node {
	t.Helper()
	return &node{nodetest.New(t, change...)}
}

func nodeOn(t *testing.T, m *tpmtest.Machine, change ...func(*tpm.Config)) *node {
	t.Helper()
	return &node{nodetest.On(t, m, change...)}
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
