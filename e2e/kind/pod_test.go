package kind

import (
	"syscall"
	"testing"
)

// TestPod: the container makes a keyring at its first start. It opens the same keyring
// after an orderly end and after a kill.
func TestPod(t *testing.T) {
	for _, variant := range []string{"swtpm", "softhsm"} {
		t.Run(variant, func(t *testing.T) {
			t.Parallel()
			p := NewPod(t, variant)
			p.Start()
			keyring := p.Kleidi("keyring", "show")
			for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
				p.Stop(signal)
				p.Start()
				if now := p.Kleidi("keyring", "show"); now != keyring {
					t.Errorf("after signal %v the keyring is\n%s\nnot\n%s", signal, now, keyring)
				}
			}
		})
	}
}
