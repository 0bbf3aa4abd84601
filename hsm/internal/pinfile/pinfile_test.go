package pinfile

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/beezy-dev/kleidi/seal"
)

// size returns the size of a PIN, or 0 for none.
func size(p *seal.Secret) (n int) {
	if p != nil {
		p.With(func(b []byte) { n = len(b) })
	}
	return n
}

func TestRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pin")
	for content, want := range map[string]int{"1234": 4, "1234\n": 4, "1234\r\n": 4, " 12 \n34\n": 4, "": 0, "\n": 0,
		strings.Repeat("1", MaxPIN) + "\n": MaxPIN, strings.Repeat("1", MaxPIN+1): 0} {
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		p, err := Read(seal.Memory{}, path)
		if size(p) != want || (err == nil) != (want > 0) {
			t.Errorf("%.20q: %d bytes, %v", content, size(p), err)
		}
		if err != nil && (seal.CauseOf(err) != seal.CauseCredentials || strings.Contains(strings.ReplaceAll(err.Error(), path, ""), "1111")) {
			t.Error(err)
		}
		if p != nil {
			p.Close()
		}
	}
	for _, mode := range []os.FileMode{0o640, 0o604, 0o660} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
		if _, err := Read(seal.Memory{}, path); err == nil {
			t.Errorf("mode %o is taken", mode)
		}
	}
	fifo := path + ".fifo"
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, other := range []string{fifo, filepath.Dir(path), path + ".missing"} {
		if _, err := Read(seal.Memory{}, other); seal.CauseOf(err) != seal.CauseCredentials {
			t.Errorf("%s: %v", other, err)
		}
	}
}
