package files

import (
	"os"
	"path/filepath"
	"testing"
)

// TestReadSecretLimit: a file that is too long is refused, not cut.
func TestReadSecretLimit(t *testing.T) {
	const limit = 4 << 10
	path := filepath.Join(t.TempDir(), "config.json")
	for size, tooLong := range map[int]bool{0: false, limit: false, limit + 1: true} {
		if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
		b, err := ReadSecret(path, limit)
		if (err != nil) != tooLong || !tooLong && len(b) != size {
			t.Errorf("%d bytes: %d are read, %v", size, len(b), err)
		}
	}
}
