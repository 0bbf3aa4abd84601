package keyring

import (
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/sealtest"
)

// TestNoKEKOutsideLockedMemory2 is TestNoKEKOutsideLockedMemory for the additions of
// format 2: own sections, following, records, and retired KEKs that are used once.
func TestNoKEKOutsideLockedMemory2(t *testing.T) {
	watch := sealtest.NewWatch()
	random := func(name string) *seal.Secret {
		kek := must[*seal.Secret](t)(seal.Memory{}.NewKEK())
		watch.Add(name, kek)
		return kek
	}
	copyOf := func(name string, k *seal.Secret) *seal.Secret {
		c := must[*seal.Secret](t)(seal.Memory{}.New(seal.KEKSize))
		k.With(func(b []byte) { c.With(func(out []byte) { copy(out, b) }) })
		watch.Add(name, c)
		return c
	}
	ok := must[*Keyring](t)
	first := random("first KEK")
	a := ok(New(cluster, first, append(tpmSlots("cp-1", "one"), sharedSlots("one")...), nodes, now))
	a = ok(ok(a.Upgrade(entry("cp-1", "a"))).WithNode(entry("cp-2", "b"), now))
	b := ok(ok(open(a.Shared(), copyOf("first KEK on b", first), nil)).OnNode("cp-2", tpmSlots("cp-2", "two"), nil))
	second := random("second KEK")
	a = ok(a.Stage(second, imports(), now))
	a = ok(a.WithOwnSlots(a.OwnSlots(), tpmSlots("cp-1", "sealed")))
	b = ok(ok(b.Follow(published(t, a), nil)).OpenStaged(copyOf("second KEK on b", second)))
	b = ok(b.WithOwnSlots(b.OwnSlots(), tpmSlots("cp-2", "sealed")))
	r := recordOf(b)
	r.Acknowledged = b.StagedID()
	before := published(t, a)
	a = ok(a.Activate(now))
	if _, err := signed(t, b, r).Verify(a); err != nil {
		t.Fatal(err)
	}
	b = ok(b.Follow(published(t, a), nil))
	if err := Precedes(before, b); err != nil { // by the retired KEK
		t.Fatal(err)
	}
	if found := watch.Find(t); len(found) > 0 {
		t.Errorf("found:\n%s", strings.Join(found, "\n"))
	}
}
