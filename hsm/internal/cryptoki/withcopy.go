//go:build cgo

package cryptoki

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/beezy-dev/kleidi/seal"
)

// WithCopy calls f with a copy of s in locked memory. Modules are not called inside
// [seal.Secret.With], because package runtime/secret, which With may use, can't erase
// after a call into C.
func WithCopy(mem seal.Memory, s *seal.Secret, f func(b []byte) error) error {
	page, err := unix.Mmap(-1, 0, unix.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return fmt.Errorf("mmap: %w", err)
	}
	defer func() {
		clear(page)
		_ = unix.Munmap(page)
	}()
	for _, lock := range []func() error{
		func() error { return unix.Mlock(page) },
		func() error { return unix.Madvise(page, unix.MADV_DONTDUMP) },
		func() error { return unix.Madvise(page, unix.MADV_WIPEONFORK) },
	} {
		if err := lock(); err != nil && !mem.BestEffort {
			return seal.Errorf(seal.CauseMemory, "raise LimitMEMLOCK= of the unit (ulimit -l), or accept unlocked memory with memory.lock: best-effort",
				"lock memory for a call into the PKCS#11 module: %w", err)
		}
	}
	var n int
	s.With(func(b []byte) { n = copy(page, b) })
	return f(page[:n:n])
}
