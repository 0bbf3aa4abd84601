package seal

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// vmFlags returns the flags of the mapping that b lies in, as proc_pid_smaps(5)
// abbreviates them: lo is locked, dd is left out of core files, wf is wiped on
// fork, dc is not copied on fork.
func vmFlags(t *testing.T, b []byte) []string {
	t.Helper()
	smaps, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		t.Fatal(err)
	}
	at := uintptr(unsafe.Pointer(&b[0]))
	inside := false
	for line := range strings.Lines(string(smaps)) {
		var from, to uintptr
		if n, _ := fmt.Sscanf(line, "%x-%x ", &from, &to); n == 2 {
			inside = from <= at && at < to
		}
		if flags, ok := strings.CutPrefix(line, "VmFlags:"); ok && inside {
			return strings.Fields(flags)
		}
	}
	t.Fatalf("no mapping at %#x", at)
	return nil
}

func wantFlags(t *testing.T, kind string, b []byte, want ...string) {
	t.Helper()
	flags := vmFlags(t, b)
	for _, f := range want {
		if !slices.Contains(flags, f) {
			t.Errorf("%s: the mapping has flags %v and not %s", kind, flags, f)
		}
	}
}

// TestSecretsAreKeptFromOthers: each kind of memory is locked, in no core file
// and in no child process.
func TestSecretsAreKeptFromOthers(t *testing.T) {
	s, err := Memory{}.New(KEKSize)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if s.Kind() == "memfd_secret" {
		wantFlags(t, s.Kind(), s.buf, "lo", "dd", "dc")
	}
	buf, kind, err := Memory{}.mmapAnonymous(os.Getpagesize())
	if err != nil || kind != "mlock" {
		t.Fatalf("%q, %v", kind, err)
	}
	defer release(buf)
	wantFlags(t, kind, buf, "lo", "dd", "wf")
}

// withoutLockedMemory runs f on a thread for which no memory can be locked.
func withoutLockedMemory(t *testing.T, f func()) {
	t.Helper()
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil {
			t.Fatal(err)
		}
	}()
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: 0, Max: limit.Max}); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends without the capability
		err := dropCapability(unix.CAP_IPC_LOCK)
		if err == nil {
			f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// dropCapability takes a capability from this thread.
func dropCapability(capability int) error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData
	if err := unix.Capget(&header, &sets[0]); err != nil {
		return err
	}
	sets[capability/32].Effective &^= 1 << (capability % 32)
	return unix.Capset(&header, &sets[0])
}

// TestNoMemoryToLock: without memory that can be locked there is no Secret, unless the
// configuration accepts that. Take zeroes its argument in either case.
func TestNoMemoryToLock(t *testing.T) {
	withoutLockedMemory(t, func() {
		plain := bytes.Repeat([]byte{7}, KEKSize)
		s, err := Memory{}.Take(plain)
		if e, ok := errors.AsType[*Error](err); !ok || s != nil || e.Cause != CauseMemory || !strings.Contains(e.Hint, "memory.lock: best-effort") {
			t.Errorf("%v, %v", s, err)
		}
		if !bytes.Equal(plain, make([]byte, KEKSize)) {
			t.Error("Take has failed and left its argument")
		}
		if s, err = (Memory{}).NewKEK(); s != nil || CauseOf(err) != CauseMemory {
			t.Errorf("NewKEK: %v, %v", s, err)
		}
		if s, err = (Memory{BestEffort: true}).NewKEK(); err != nil {
			t.Error(err)
			return
		}
		defer s.Close()
		if s.Kind() != "unlocked" || slices.Contains(vmFlags(t, s.buf), "lo") {
			t.Errorf("memory of kind %q with flags %v", s.Kind(), vmFlags(t, s.buf))
		}
		wantFlags(t, s.Kind(), s.buf, "dd", "wf")
	})
}

// shared returns a mapping and a second one of the same memory, which shows what
// is left once the first is gone.
func shared(t *testing.T) (buf, view []byte) {
	t.Helper()
	size := os.Getpagesize()
	buf, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	p, err := unix.MremapPtr(unsafe.Pointer(&buf[0]), 0, nil, uintptr(size), unix.MREMAP_MAYMOVE)
	if err != nil {
		t.Fatal(err)
	}
	return buf, unsafe.Slice((*byte)(p), size)
}

// TestForgottenSecretsAreZeroed: the memory of a Secret is zeroed before it is
// given back, when it is closed and when nothing refers to it any more.
func TestForgottenSecretsAreZeroed(t *testing.T) {
	zero := make([]byte, KEKSize)
	buf, view := shared(t)
	s := secretIn(buf, KEKSize, "test")
	s.With(func(b []byte) { copy(b, bytes.Repeat([]byte{7}, KEKSize)) })
	if bytes.Equal(view[:KEKSize], zero) {
		t.Fatal("the second mapping does not show the secret")
	}
	s.Close()
	if !bytes.Equal(view[:KEKSize], zero) {
		t.Error("a closed secret is not zeroed")
	}

	buf, view = shared(t)
	secretIn(buf, KEKSize, "test").With(func(b []byte) { copy(b, bytes.Repeat([]byte{7}, KEKSize)) })
	for range 1000 {
		if runtime.GC(); bytes.Equal(view[:KEKSize], zero) {
			return
		}
	}
	t.Error("a secret that nothing refers to is not zeroed")
}

// TestNoSecretOfNoSize: a secret has at least one byte.
func TestNoSecretOfNoSize(t *testing.T) {
	for _, n := range []int{0, -1} {
		if s, err := (Memory{}).New(n); err == nil {
			t.Errorf("a secret of %d bytes: %v", n, s)
		}
	}
}

// TestSecretsKeepNoFileOpen: memfd_secret gives a file, which is closed once it is
// mapped.
func TestSecretsKeepNoFileOpen(t *testing.T) {
	count := func() int {
		files, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(files)
	}
	before := count()
	for range 3 {
		s, err := Memory{}.New(KEKSize)
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
	}
	if after := count(); after > before {
		t.Errorf("%d open files before, %d after", before, after)
	}
}
