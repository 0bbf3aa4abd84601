package keyring

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/seal"
)

var (
	cluster = seal.ClusterID{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
	now     = time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)
	nodes   = []Node{{Name: "cp-1", EK: "sha256:" + hex64("a")}}
)

func hex64(digit string) string { return string(bytes.Repeat([]byte(digit), 64)) }

// newKEK returns the KEK whose bytes are first, first+1 and so on.
func newKEK(t testing.TB, first byte) *seal.Secret {
	t.Helper()
	b := make([]byte, seal.KEKSize)
	for i := range b {
		b[i] = first + byte(i)
	}
	s, err := seal.Memory{}.Take(b)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func slots(name string) []seal.Slot {
	data, _ := json.Marshal(map[string]string{"name": name})
	return []seal.Slot{{Type: seal.TypeTPM, Node: "cp-1", Data: data}, {Type: seal.TypeRecovery, Data: data}}
}

func must[T any](t testing.TB) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func newKeyring(t testing.TB, first byte) *Keyring {
	t.Helper()
	return must[*Keyring](t)(New(cluster, newKEK(t, first), slots("one"), nodes, now))
}

// rotate stages and activates the KEK whose first byte is first.
func rotate(t testing.TB, k *Keyring, first byte) *Keyring {
	t.Helper()
	ok := must[*Keyring](t)
	staged := ok(k.Stage(newKEK(t, first), slots("next"), now.Add(time.Hour)))
	defer staged.Close()
	return ok(staged.Activate(now.Add(2 * time.Hour)))
}

// reopen parses and opens the stored form of k, as a node with this anchor would.
func reopen(t testing.TB, k *Keyring, kek *seal.Secret, anchor *Anchor) *Keyring {
	t.Helper()
	u := must[*Untrusted](t)(Parse(k.Marshal()))
	return must[*Keyring](t)(u.Open(kek, anchor))
}

func TestRoundTrip(t *testing.T) {
	k := newKeyring(t, 1)
	anchor := k.Anchor()
	again := reopen(t, k, newKEK(t, 1), &anchor)
	c, id, err := k.Encrypt([]byte("seed"))
	if err != nil || id != k.CurrentID() {
		t.Fatal(id, err)
	}
	p, err := again.Decrypt(id, c)
	if err != nil || string(p) != "seed" {
		t.Fatalf("%q, %v", p, err)
	}
	if again.Revision() != 1 || again.ClusterID() != cluster || !bytes.Equal(again.Marshal(), k.Marshal()) {
		t.Error("the keyring changed on the way")
	}
}

func TestRotationKeepsAllOlderKEKs(t *testing.T) {
	k := newKeyring(t, 1)
	first := k.Anchor()
	type sealed struct {
		c  []byte
		id seal.KeyID
	}
	var all []sealed
	for i := range byte(5) {
		c, id, err := k.Encrypt([]byte{i + 1})
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, sealed{c, id})
		old := k
		k = rotate(t, k, 40+40*i)
		old.Close()
	}
	again := reopen(t, k, newKEK(t, 40+40*4), &first)
	for i, s := range all {
		if p, err := again.Decrypt(s.id, s.c); err != nil || !bytes.Equal(p, []byte{byte(i) + 1}) {
			t.Errorf("seed %d: %v", i, err)
		}
		if !again.Holds(s.id) {
			t.Errorf("key ID %d is not held", i)
		}
	}
	if got := again.Info(); len(got.Retired) != 5 || got.Revision != 11 || got.Staged != nil {
		t.Errorf("%+v", got)
	}
}

func TestSizesOfDEKSeeds(t *testing.T) {
	k := newKeyring(t, 1)
	for n, want := range map[int]error{0: seal.ErrMalformed, 1: nil, 32: nil, 995: nil, 996: seal.ErrMalformed, 1 << 20: seal.ErrMalformed} {
		c, id, err := k.Encrypt(make([]byte, n))
		if !errors.Is(err, want) {
			t.Errorf("%d bytes: %v, want %v", n, err, want)
			continue
		}
		if want != nil {
			continue
		}
		if len(c) > MaxCiphertext || len(c) != n+29 {
			t.Errorf("%d bytes give %d bytes of ciphertext", n, len(c))
		}
		if p, err := k.Decrypt(id, c); err != nil || !bytes.Equal(p, make([]byte, n)) {
			t.Errorf("%d bytes do not decrypt: %v", n, err)
		}
	}
}

func TestDecryptRefusals(t *testing.T) {
	k := newKeyring(t, 1)
	c, id, err := k.Encrypt([]byte("seed"))
	if err != nil {
		t.Fatal(err)
	}
	other := newKeyring(t, 99)
	for name, test := range map[string]struct {
		id   seal.KeyID
		c    []byte
		want error
	}{
		"other key ID": {other.CurrentID(), c, seal.ErrUnknownKey},
		"no key ID":    {"", c, seal.ErrUnknownKey},
		"upper case":   {seal.KeyID(strings.ToUpper(string(id))), c, seal.ErrUnknownKey},
		"empty":        {id, nil, seal.ErrMalformed},
		"no plaintext": {id, c[:29], seal.ErrMalformed},
		"format 2":     {id, append([]byte{2}, c[1:]...), seal.ErrMalformed},
		"too long":     {id, append([]byte{1}, make([]byte, 1024)...), seal.ErrMalformed},
		"truncated":    {id, c[:len(c)-1], seal.ErrAuthentication},
		"longer":       {id, append(bytes.Clone(c), 0), seal.ErrAuthentication},
	} {
		if p, err := k.Decrypt(test.id, test.c); !errors.Is(err, test.want) || p != nil {
			t.Errorf("%s: %q, %v; want %v", name, p, err, test.want)
		}
	}
	for i := 1; i < len(c)*8; i++ {
		flipped := bytes.Clone(c)
		flipped[i/8] ^= 1 << (i % 8)
		if _, err := k.Decrypt(id, flipped); err == nil {
			t.Fatalf("bit %d flipped: still decrypts", i)
		}
	}
}

// TestSameKEKOfAnotherCluster: the key ID and the data that GCM authenticates depend
// on the cluster.
func TestSameKEKOfAnotherCluster(t *testing.T) {
	k := newKeyring(t, 1)
	other := must[*Keyring](t)(New(seal.ClusterID{9}, newKEK(t, 1), slots("one"), nodes, now))
	if other.CurrentID() == k.CurrentID() {
		t.Fatal("the key ID is the same in two clusters")
	}
	c, _, _ := k.Encrypt([]byte("seed"))
	if _, err := other.Decrypt(other.CurrentID(), c); !errors.Is(err, seal.ErrAuthentication) {
		t.Error(err)
	}
}

func TestStagedKEKDecryptsBeforeItIsCurrent(t *testing.T) {
	ok := must[*Keyring](t)
	k := newKeyring(t, 1)
	staged := ok(k.Stage(newKEK(t, 60), slots("next"), now))
	again := reopen(t, staged, newKEK(t, 1), nil)
	if _, err := again.Activate(now); !errors.Is(err, errNothingStaged) {
		t.Errorf("a staged KEK that was not opened is activated: %v", err)
	}
	if _, err := again.OpenStaged(newKEK(t, 61)); seal.CauseOf(err) != seal.CauseSlotCorrupt {
		t.Errorf("another KEK is taken for the staged one: %v", err)
	}
	if got := again.StagedSlots(); len(got) != 2 {
		t.Errorf("%d staged slots", len(got))
	}
	opened := ok(again.OpenStaged(newKEK(t, 60)))
	next := ok(staged.Activate(now))
	c, id, err := next.Encrypt([]byte("seed"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := opened.Decrypt(id, c); err != nil {
		t.Errorf("a node that opened the staged KEK: %v", err)
	}
	if _, err := again.Decrypt(id, c); !errors.Is(err, seal.ErrUnknownKey) {
		t.Errorf("a node that did not: %v", err)
	}
	if opened.CurrentID() != k.CurrentID() {
		t.Error("the staged KEK is current")
	}
	if err := errors.Join(errOf(k.Activate(now)), errOf(newKeyring(t, 1).OpenStaged(newKEK(t, 2)))); err == nil {
		t.Error("a KEK is activated or opened that was never staged")
	}
}

func errOf[T any](_ T, err error) error { return err }

func TestChangesLeaveTheOldKeyring(t *testing.T) {
	ok := must[*Keyring](t)
	k := newKeyring(t, 1)
	before := string(k.Marshal())
	replaced := ok(k.WithSlots(slots("two")))
	raised := ok(replaced.AtLeast(17))
	if replaced.Revision() != 2 || raised.Revision() != 17 || ok(raised.AtLeast(3)).Revision() != 18 {
		t.Error("a change raises the revision by one, AtLeast at least to what it is told")
	}
	moved := ok(raised.WithNodes([]Node{{Name: "cp-9"}}, []seal.Slot{{Type: "tpm", Node: "cp-9", Data: []byte("{}")}}))
	if got := moved.Nodes(); len(got) != 1 || got[0].Name != "cp-9" {
		t.Errorf("nodes %v", got)
	}
	mine := k.Slots()
	mine[0].Data[2] = 'X'
	mine[0].Type = "x"
	if string(k.Marshal()) != before || k.Slots()[0].Type != seal.TypeTPM || bytes.Equal(k.Slots()[0].Data, mine[0].Data) {
		t.Error("a change shows in the keyring that it was made from")
	}
	out := k.Marshal()
	clear(out)
	if string(k.Marshal()) != before {
		t.Error("Marshal hands out the keyring's own bytes")
	}
}

func TestKeyringsShareKEKsUntilTheLastIsClosed(t *testing.T) {
	kek := newKEK(t, 1)
	k := must[*Keyring](t)(New(cluster, kek, slots("one"), nodes, now))
	next := must[*Keyring](t)(k.WithSlots(slots("two")))
	isOpen := func() (open bool) { kek.With(func(b []byte) { open = b != nil }); return }
	k.Close()
	k.Close()
	if !isOpen() {
		t.Fatal("closing one keyring, twice, closes the other's KEK")
	}
	must[*Keyring](t)(next.WithSlots(slots("three"))).Close()
	next.Close()
	if isOpen() {
		t.Error("the KEK is open after its last keyring is closed")
	}
	if _, err := next.WithSlots(slots("four")); err == nil {
		t.Error("a closed keyring can be changed")
	}
}

// TestFailedCallsLeaveTheKEKToTheCaller: a call that fails does not close the KEK, so
// the caller can use it again.
func TestFailedCallsLeaveTheKEKToTheCaller(t *testing.T) {
	kek := newKEK(t, 1)
	if _, err := New(cluster, kek, nil, nodes, now); err == nil {
		t.Fatal("a keyring without slots is made")
	}
	u := must[*Untrusted](t)(Parse(newKeyring(t, 2).Marshal()))
	if _, err := u.Open(kek, nil); err == nil {
		t.Fatal("opens")
	}
	if !kek.Equal(newKEK(t, 1)) {
		t.Error("the KEK is closed")
	}
	for _, bad := range []*seal.Secret{nil, closedKEK(t)} {
		if _, err := u.Open(bad, nil); seal.CauseOf(err) != seal.CauseSlotCorrupt {
			t.Error(err)
		}
		if NewKeyID(cluster, bad) != "" {
			t.Error("no KEK has a key ID")
		}
	}
	if _, err := New(cluster, closedKEK(t), slots("one"), nodes, now); err == nil {
		t.Error("a keyring of a closed KEK is made")
	}
}

func closedKEK(t *testing.T) *seal.Secret {
	kek := newKEK(t, 1)
	kek.Close()
	return kek
}

func TestConcurrentReadsAndChanges(t *testing.T) {
	k := newKeyring(t, 1)
	var wg sync.WaitGroup
	for i := range byte(8) {
		wg.Go(func() {
			c, id, err := k.Encrypt([]byte{i})
			if err != nil {
				t.Error(err)
			}
			next, err := k.AtLeast(uint64(i))
			if err != nil {
				t.Error(err)
				return
			}
			if p, err := next.Decrypt(id, c); err != nil || p[0] != i {
				t.Error(err)
			}
			next.Close()
		})
	}
	wg.Wait()
}

// TestOperationsAllocateTheirResultOnly: Encrypt and Decrypt, which serve every call of
// kube-apiserver, allocate only their results.
func TestOperationsAllocateTheirResultOnly(t *testing.T) {
	k := newKeyring(t, 1)
	seed := make([]byte, 32)
	c, id, _ := k.Encrypt(seed)
	if n := testing.AllocsPerRun(100, func() { k.Encrypt(seed) }); n > 1 {
		t.Errorf("Encrypt allocates %v times", n)
	}
	if n := testing.AllocsPerRun(100, func() { k.Decrypt(id, c) }); n > 1 {
		t.Errorf("Decrypt allocates %v times", n)
	}
}

func BenchmarkEncrypt(b *testing.B) {
	k, seed := newKeyring(b, 1), make([]byte, 32)
	b.ReportAllocs()
	for b.Loop() {
		k.Encrypt(seed)
	}
}

func BenchmarkDecrypt(b *testing.B) {
	k := newKeyring(b, 1)
	c, id, _ := k.Encrypt(make([]byte, 32))
	b.ReportAllocs()
	for b.Loop() {
		k.Decrypt(id, c)
	}
}

func BenchmarkOpen(b *testing.B) {
	file, kek := golden(b, "keyring.json"), newKEK(b, 0x81)
	for b.Loop() {
		u, err := Parse(file)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := u.Open(kek, nil); err != nil {
			b.Fatal(err)
		}
	}
}
