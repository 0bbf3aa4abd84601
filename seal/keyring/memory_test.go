package keyring

import (
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/sealtest"
)

// TestNoKEKOutsideLockedMemory: after every derivation no KEK is in the process's
// memory outside its Secret.
func TestNoKEKOutsideLockedMemory(t *testing.T) {
	watch := sealtest.NewWatch()
	random := func(name string) *seal.Secret {
		kek := must[*seal.Secret](t)(seal.Memory{}.NewKEK())
		watch.Add(name, kek)
		return kek
	}
	ok := must[*Keyring](t)
	k := ok(New(cluster, random("first KEK"), slots("one"), nodes, now))
	seed, first, err := k.Encrypt([]byte("seed"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"second KEK", "third KEK"} {
		k = ok(ok(k.Stage(random(name), slots(name), now)).Activate(now))
		u := must[*Untrusted](t)(Parse(k.Marshal()))
		again := must[*seal.Secret](t)(seal.Memory{}.New(seal.KEKSize))
		k.KEK().With(func(b []byte) { again.With(func(c []byte) { copy(c, b) }) })
		watch.Add(name, again)
		k = ok(u.Open(again, nil))
		if _, _, err := k.Encrypt([]byte("seed")); err != nil {
			t.Fatal(err)
		}
		if _, err := k.Decrypt(first, seed); err != nil { // makes the cipher of a retired KEK
			t.Fatal(err)
		}
	}
	if found := watch.Find(t); len(found) > 0 {
		t.Errorf("found:\n%s", strings.Join(found, "\n"))
	}
	leak := make([]byte, seal.KEKSize) // proves that the watch finds copies
	k.KEK().With(func(b []byte) { copy(leak, b) })
	if found := watch.Find(t); len(found) == 0 {
		t.Error("a leaked KEK is not found")
	}
	clear(leak)
}
