package seal

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// Memory allocates locked memory. The zero Memory fails if the kernel locks no memory. It
// is the default of the configuration.
type Memory struct {
	// BestEffort allocates ordinary memory if the kernel locks none
	// (memory.lock: best-effort).
	BestEffort bool
}

// Secret is a key in locked memory. The memory comes from memfd_secret(2) if the
// kernel has it: such memory is mapped nowhere else, not even by the kernel. It is
// anonymous memory otherwise: locked, left out of core files and wiped on fork. A
// Secret can't be printed, logged or marshalled. It is zeroed by Close, or once it
// is unreachable.
type Secret struct {
	mu      sync.Mutex
	buf     []byte // the whole mapping
	n       int
	kind    string
	cleanup runtime.Cleanup
}

// errSecret is the error of every method that would marshal a Secret.
var errSecret = errors.New("a secret can't be serialised")

const redacted = "[secret]"

// New returns a zeroed Secret of n bytes.
func (m Memory) New(n int) (*Secret, error) {
	if n <= 0 {
		return nil, fmt.Errorf("secret of %d bytes", n)
	}
	buf, kind, err := m.mmap(n)
	if err != nil {
		return nil, &Error{Cause: CauseMemory, Err: fmt.Errorf("lock memory for a secret: %w", err),
			Hint: "raise LimitMEMLOCK= of the unit (ulimit -l), or accept unlocked memory with memory.lock: best-effort"}
	}
	return secretIn(buf, n, kind), nil
}

// secretIn returns the Secret that owns the mapping buf.
func secretIn(buf []byte, n int, kind string) *Secret {
	s := &Secret{buf: buf, n: n, kind: kind}
	s.cleanup = runtime.AddCleanup(s, release, buf)
	return s
}

// Take moves b into a new Secret. It zeroes b even if it fails.
func (m Memory) Take(b []byte) (*Secret, error) {
	defer clear(b)
	s, err := m.New(len(b))
	if err != nil {
		return nil, err
	}
	copy(s.buf, b)
	return s, nil
}

// NewKEK returns a Secret of KEKSize bytes from crypto/rand.
func (m Memory) NewKEK() (*Secret, error) {
	s, err := m.New(KEKSize)
	if err != nil {
		return nil, err
	}
	s.With(func(b []byte) { rand.Read(b) }) // crypto/rand.Read never fails
	return s, nil
}

// mmap maps at least n bytes and names the kind of memory.
func (m Memory) mmap(n int) (buf []byte, kind string, err error) {
	page := unix.Getpagesize()
	size := (n + page - 1) / page * page
	if buf, err := mmapSecret(size); err == nil {
		return buf, "memfd_secret", nil
	}
	return m.mmapAnonymous(size)
}

func mmapSecret(size int) ([]byte, error) {
	fd, err := unix.MemfdSecret(unix.O_CLOEXEC)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, int64(size)); err != nil {
		return nil, err
	}
	b, err := unix.Mmap(fd, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	if err := unix.Madvise(b, unix.MADV_DONTFORK); err != nil {
		_ = unix.Munmap(b)
		return nil, err
	}
	return b, nil
}

func (m Memory) mmapAnonymous(size int) (buf []byte, kind string, err error) {
	buf, err = unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, "", fmt.Errorf("mmap: %w", err)
	}
	err = errors.Join(advise(buf), lock(buf))
	switch {
	case err == nil:
		return buf, "mlock", nil
	case m.BestEffort:
		return buf, "unlocked", nil
	}
	_ = unix.Munmap(buf)
	return nil, "", err
}

// advise keeps b out of core files and of child processes.
func advise(b []byte) error {
	for _, advice := range []int{unix.MADV_DONTDUMP, unix.MADV_WIPEONFORK} {
		if err := unix.Madvise(b, advice); err != nil {
			return fmt.Errorf("madvise: %w", err)
		}
	}
	return nil
}

// lock keeps b out of swap space.
func lock(b []byte) error {
	if err := unix.Mlock(b); err != nil {
		return fmt.Errorf("mlock: %w", err)
	}
	return nil
}

// release zeroes and unmaps buf. The garbage collector calls it for a Secret that
// was not closed.
func release(buf []byte) {
	clear(buf)
	_ = unix.Munmap(buf)
}

// With calls f with the secret itself, not with a copy; f must not keep it. If the
// Secret is closed, f gets nil. What f leaves in registers, on the stack and on the
// heap is erased, if the toolchain supports it; see [Erase].
func (s *Secret) With(f func(b []byte)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var b []byte
	if s.buf != nil {
		b = s.buf[:s.n:s.n]
	}
	Erase(func() { f(b) })
}

// Equal reports, in constant time, whether s and o hold the same bytes. A nil or
// closed Secret equals no other Secret.
func (s *Secret) Equal(o *Secret) bool {
	if s == nil || o == nil {
		return false
	}
	if s == o {
		return true
	}
	// Comparing digests avoids a With inside a With, which could deadlock: a.Equal(b)
	// and b.Equal(a) lock the two secrets in opposite order.
	a, b := s.digest(), o.digest()
	return a != nil && b != nil && subtle.ConstantTimeCompare(a, b) == 1
}

// digest returns the SHA-256 digest of the secret, or nil if s is closed.
func (s *Secret) digest() (d []byte) {
	d = make([]byte, 0, sha256.Size)
	s.With(func(b []byte) {
		if len(b) == 0 {
			d = nil
			return
		}
		sum := sha256.Sum256(b)
		d = append(d, sum[:]...)
	})
	return d
}

// Kind names the memory that holds the secret: "memfd_secret", "mlock" or "unlocked".
func (s *Secret) Kind() string { return s.kind }

// Close zeroes the secret and unmaps its memory. A second Close does nothing.
func (s *Secret) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.buf == nil {
		return nil
	}
	s.cleanup.Stop()
	release(s.buf)
	s.buf = nil
	return nil
}

// Format implements fmt.Formatter; no verb prints the secret.
func (s *Secret) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(redacted)) }

// String implements fmt.Stringer.
func (s *Secret) String() string { return redacted }

// LogValue implements slog.LogValuer.
func (s *Secret) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalJSON always fails.
func (s *Secret) MarshalJSON() ([]byte, error) { return nil, errSecret }

// MarshalText always fails.
func (s *Secret) MarshalText() ([]byte, error) { return nil, errSecret }

// MarshalBinary always fails, and so does gob, which calls it.
func (s *Secret) MarshalBinary() ([]byte, error) { return nil, errSecret }

// KEKSize is the size of a KEK in bytes.
const KEKSize = 32
