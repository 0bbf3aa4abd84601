package kill

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/internal/powerloss"
)

// TestPowerLoss cuts the power as soon as a verb has succeeded, whether the command or
// serve changed the keyring. Killing the process would not test this, because the
// kernel keeps written data whether it was flushed or not.
func TestPowerLoss(t *testing.T) {
	for _, v := range verbs {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			s := set(t, v)
			if !v.asked {
				s.cutAfter(func(*history) {
					if err := s.do(); err != nil {
						t.Fatal(err)
					}
				})
			}
			if strings.HasPrefix(v.name, "init") || s.approve != nil {
				return // serve never makes a keyring
			}
			s.cutAfter(func(h *history) { s.askServe(h, victim{}) })
		})
	}
}

// cutAfter cuts the power after change. Each file of the state folder must have the
// content that it had then, and the keyring must open.
func (s *scene) cutAfter(change func(*history)) {
	s.t.Helper()
	s.restore(s.start)
	disk := s.powerlossDisk()
	h := s.history.clone()
	change(h)
	before := s.state()
	delete(before, "ak.json") // not flushed: without it the next start makes another
	disk.Cut()
	after := s.state()
	for name, content := range before {
		if !bytes.Equal(after[name], content) {
			s.t.Fatalf("%s is not as it was before the power failure", name)
		}
	}
	if !s.opens(h) {
		s.t.Error("the keyring does not open")
	}
	s.clean()
	s.serving(h, func() {})
	if err := powerloss.Unmount(s.stateDir()); err != nil {
		s.t.Fatal(err)
	}
}

// powerlossDisk moves the state folder's files to a disk whose power can be cut.
func (s *scene) powerlossDisk() *powerloss.Disk {
	s.t.Helper()
	if err := os.MkdirAll(s.stateDir(), 0o700); err != nil {
		s.t.Fatal(err)
	}
	files := s.files("state")
	disk := powerloss.New(s.t, s.stateDir())
	for name, content := range files {
		s.write("state/"+name, string(content))
	}
	disk.Flush()
	return disk
}
