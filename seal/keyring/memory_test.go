package keyring

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
)

// mask keeps this test from holding the bytes that it looks for.
const mask = 0xa5

func masked(s *seal.Secret) (m []byte, at uint64) {
	s.With(func(b []byte) {
		for _, c := range b {
			m = append(m, c^mask)
		}
		fmt.Sscanf(fmt.Sprintf("%p", b), "0x%x", &at)
	})
	return m, at
}

// scan looks for the masked secrets in this process's writable memory, as a core
// file would show it, apart from the pages that are the secrets' own.
func scan(t *testing.T, secrets map[string][]byte, own map[uint64]bool) (found []string) {
	t.Helper()
	maps := must[[]byte](t)(os.ReadFile("/proc/self/maps"))
	mem := must[*os.File](t)(os.Open("/proc/self/mem"))
	defer mem.Close()
	buf := make([]byte, 1<<20)
	for line := range strings.Lines(string(maps)) {
		var from, to uint64
		var perm string
		fmt.Sscanf(line, "%x-%x %s", &from, &to, &perm)
		if !strings.HasPrefix(perm, "rw") {
			continue
		}
		for ; from < to; from += uint64(len(buf) / 2) { // windows overlap
			n, _ := mem.ReadAt(buf[:min(uint64(len(buf)), to-from)], int64(from)) // locked memory can't be read
			for i := range n {
				buf[i] ^= mask
			}
			for page := range own {
				if page >= from && page < from+uint64(n) {
					clear(buf[page-from:][:seal.KEKSize])
				}
			}
			for name, m := range secrets {
				if bytes.Contains(buf[:n], m) {
					found = append(found, fmt.Sprintf("%s in %s", name, strings.TrimSpace(line)))
				}
			}
			clear(buf[:n])
		}
	}
	return found
}

// TestNoKEKOutsideLockedMemory runs every derivation and then looks for the KEKs
// in the rest of the process's memory.
func TestNoKEKOutsideLockedMemory(t *testing.T) {
	secrets, own := map[string][]byte{}, map[uint64]bool{}
	random := func(name string) *seal.Secret {
		kek := must[*seal.Secret](t)(seal.Memory{}.NewKEK())
		m, at := masked(kek)
		secrets[name], own[at] = m, true
		return kek
	}
	ok := must[*Keyring](t)
	k := ok(New(cluster, random("first KEK"), slots("one"), nodes, now))
	for _, name := range []string{"second KEK", "third KEK"} {
		k = ok(ok(k.Stage(random(name), slots(name), now)).Activate(now))
		u := must[*Untrusted](t)(Parse(k.Marshal()))
		again := must[*seal.Secret](t)(seal.Memory{}.New(seal.KEKSize))
		k.KEK().With(func(b []byte) { again.With(func(c []byte) { copy(c, b) }) })
		_, at := masked(again)
		own[at] = true
		k = ok(u.Open(again, nil))
		if _, _, err := k.Encrypt([]byte("seed")); err != nil {
			t.Fatal(err)
		}
	}
	if found := scan(t, secrets, own); len(found) > 0 {
		t.Errorf("found:\n%s", strings.Join(found, "\n"))
	}
	leak := make([]byte, seal.KEKSize) // the scan itself must be able to find something
	k.KEK().With(func(b []byte) { copy(leak, b) })
	if found := scan(t, secrets, own); len(found) == 0 {
		t.Error("the scan does not find a leaked KEK")
	}
	clear(leak)
}
