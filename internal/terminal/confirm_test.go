package terminal

import (
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
)

// TestConfirmNode: only the node's name confirms, and a name from a pipe does not count.
func TestConfirmNode(t *testing.T) {
	in := strings.NewReader("cp-1\n")
	i := Input{In: in, Err: &strings.Builder{}}
	if err := i.ConfirmNode("cp-1", "cp-1", "give --yes"); err != nil {
		t.Error(err)
	}
	err := i.ConfirmNode("cp-1", "", "give --yes")
	if _, hint := seal.SplitHint(err); err == nil || hint != "give --yes" || in.Len() != 5 {
		t.Errorf("unconfirmed: %v; %d bytes of the pipe are left", err, in.Len())
	}
	if err := i.ConfirmNode("cp-1", "cp-2", ""); err == nil {
		t.Error("another node's name confirmed")
	}
}
