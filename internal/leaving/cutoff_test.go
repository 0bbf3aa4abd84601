package leaving

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/internal/node/nodetest"
)

// TestCutOff: without a cluster the ways of each node are listed. A kubeconfig that does
// not serve ends the command before anything is changed.
func TestCutOff(t *testing.T) {
	n := nodetest.Holding(t, "cp-1", threeNodes(t))
	var out strings.Builder
	if err := CutOff(t.Context(), n, "", []string{"cp-2", "cp-3"}, &out); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"cut node cp-2 off first:\n", "cut node cp-3 off first:\n", "kubectl delete node cp-3\n"} {
		if !strings.Contains(out.String(), line) {
			t.Errorf("%q is missing in\n%s", line, out.String())
		}
	}
	if strings.Contains(out.String(), "its rights") {
		t.Errorf("a node without a cluster has rights:\n%s", out.String())
	}
	err := CutOff(t.Context(), n, filepath.Join(t.TempDir(), "none"), []string{"cp-2"}, &out)
	if err == nil || !strings.HasPrefix(err.Error(), "remove: --kubeconfig: ") || !strings.HasSuffix(err.Error(), "; the keyring was not changed") {
		t.Error(err)
	}
}
