// Package foundingtest makes first keyrings, for tests of the packages that work on one.
package foundingtest

import (
	"testing"

	"github.com/beezy-dev/kleidi/internal/founding"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/node/nodetest"
)

// Found makes the node's first keyring, and returns its recovery identity. The keyring is
// locked.
func Found(t testing.TB, n *node.Node) (identity []byte) {
	t.Helper()
	identity, recipient := nodetest.Identity(t)
	if _, err := founding.Init(t.Context(), n, founding.InitOptions{Recipients: []string{recipient}}); err != nil {
		t.Fatal(err)
	}
	return identity
}

// FoundOpen makes the node's first keyring, and opens it.
func FoundOpen(t testing.TB, n *node.Node) (identity []byte) {
	t.Helper()
	identity = Found(t, n)
	if err := n.Unlocker.Unlock(t.Context()); err != nil {
		t.Fatal(err)
	}
	return identity
}
