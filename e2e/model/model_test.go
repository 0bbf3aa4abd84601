// Package model walks the model of rotation over several nodes with bounds that take
// too long for make test.
package model

import (
	"os"
	"os/exec"
	"testing"
)

// TestLargeModel runs seal/rotation's TestModelHolds and TestModelHeals with the large
// bounds: millions of states, minutes, and some gigabytes of memory.
func TestLargeModel(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), "go", "test", "-count=1", "-v", "-timeout", "180m", "-run", "^TestModel(Holds|Heals)$", "./seal/rotation")
	cmd.Dir = "../.."
	cmd.Env = append(os.Environ(), "KLEIDI_MODEL=large")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	t.Logf("%s", out)
}
