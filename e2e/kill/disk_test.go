package kill

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/beezy-dev/kleidi/internal/powerloss"
)

// limit is a resource that a small disk can run out of.
type limit struct {
	name string
	// used returns how much is in use; option limits a tmpfs to that amount.
	used   func(unix.Statfs_t) uint64
	option func(n uint64) string
}

var limits = []limit{
	{"blocks", func(s unix.Statfs_t) uint64 { return s.Blocks - s.Bfree },
		func(n uint64) string { return fmt.Sprintf("size=%d", max(n, 1)*uint64(os.Getpagesize())) }},
	{"inodes", func(s unix.Statfs_t) uint64 { return s.Files - s.Ffree },
		func(n uint64) string { return fmt.Sprintf("nr_inodes=%d", n) }},
}

// roomy is a disk that no test here fills.
const roomy = "size=4m,nr_inodes=1000,mode=0700"

// TestDiskFull runs each verb on a full disk, then with a little more room each time,
// until the verb succeeds. A refused verb must name the fault and do no damage; an open
// keyring must still open on the full disk.
func TestDiskFull(t *testing.T) {
	for _, v := range verbs {
		t.Run(v.name, func(t *testing.T) {
			t.Parallel()
			s := set(t, v)
			for _, l := range limits {
				refused := 0
				for s.runFull(l, uint64(refused)) {
					if refused++; t.Failed() {
						t.Fatalf("with room for %d %s", refused-1, l.name)
					}
				}
				if refused == 0 {
					t.Errorf("%s: a disk without room is no obstacle; is it in use?", l.name)
				}
				t.Logf("%s: refused %d times, then enough", l.name, refused)
			}
		})
	}
}

// runFull runs the verb on a disk with room for that many more units, and reports whether
// the verb was refused.
func (s *scene) runFull(l limit, more uint64) (refused bool) {
	s.t.Helper()
	s.restore(s.start)
	disk := s.mount()
	defer disk.unmount()
	disk.limit(l, more)
	before := s.state()
	if s.approve != nil {
		s.approve() // one join spends an approval
	}
	err := s.do()
	if err != nil && !strings.Contains(err.Error(), "no space left on device") {
		s.t.Errorf("the full disk is not named: %v", err)
	}
	h := s.history.clone()
	if !s.touched(before, []step{{}}) && !s.closed {
		s.serving(h, func() {})
	}
	disk.remount(roomy)
	s.opens(h)
	if err != nil {
		s.again()
	}
	if !s.opens(h) {
		s.t.Error("the keyring does not open")
	}
	s.clean()
	s.serving(h, func() {})
	return err != nil
}

// disk is a file system on the state folder.
type disk struct {
	t    testing.TB
	path string
}

// mount moves the state folder's files to a separate disk.
func (s *scene) mount() disk {
	s.t.Helper()
	d := disk{s.t, s.stateDir()}
	if err := os.MkdirAll(d.path, 0o700); err != nil {
		s.t.Fatal(err)
	}
	files := s.files("state")
	if err := unix.Mount("kill", d.path, "tmpfs", 0, roomy); err != nil {
		s.t.Fatalf("mount a small disk, as root: %v", err)
	}
	s.t.Cleanup(func() { _ = unix.Unmount(d.path, unix.MNT_DETACH) }) // in case the test ends early
	for name, content := range files {
		s.write("state/"+name, string(content))
	}
	return d
}

func (d disk) unmount() {
	d.t.Helper()
	if err := powerloss.Unmount(d.path); err != nil {
		d.t.Fatal(err)
	}
}

func (d disk) remount(options string) {
	d.t.Helper()
	if err := unix.Mount("kill", d.path, "tmpfs", unix.MS_REMOUNT, options); err != nil {
		d.t.Fatalf("%s: %v", options, err)
	}
}

// limit leaves room for that many more units.
func (d disk) limit(l limit, more uint64) {
	d.t.Helper()
	var now unix.Statfs_t
	if err := unix.Statfs(d.path, &now); err != nil {
		d.t.Fatal(err)
	}
	d.remount(l.option(l.used(now) + more))
}
