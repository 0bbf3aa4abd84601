package keys_test

import (
	"testing"

	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/internal/nodetest"
)

// node is [nodetest.Node] with what only these tests do.
type node struct{ *nodetest.Node }

func newNode(t *testing.T, change ...func(*tpm.Config)) *node {
	t.Helper()
	return &node{nodetest.New(t, change...)}
}
