package keyring_test

import (
	"bytes"
	"encoding/json"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

var (
	cluster = seal.ClusterID{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
	now     = time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)
	nodes   = []keyring.Node{{Name: "cp-1", EK: "sha256:" + hex64("a")}}
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

func newKeyring(t testing.TB, first byte) *keyring.Keyring {
	t.Helper()
	return must[*keyring.Keyring](t)(keyring.New(cluster, newKEK(t, first), slots("one"), nodes, now))
}

// rotate stages and activates the KEK that starts with first.
func rotate(t testing.TB, k *keyring.Keyring, first byte) *keyring.Keyring {
	t.Helper()
	ok := must[*keyring.Keyring](t)
	staged := ok(k.Stage(newKEK(t, first), slots("next"), now.Add(time.Hour)))
	defer staged.Close()
	return ok(staged.Activate(now.Add(2 * time.Hour)))
}

// reopen stores, parses and opens k as a node would that holds pin.
func reopen(t testing.TB, k *keyring.Keyring, kek *seal.Secret, pin *keyring.Pin) *keyring.Keyring {
	t.Helper()
	u := must[*keyring.Untrusted](t)(keyring.Parse(k.Marshal()))
	return must[*keyring.Keyring](t)(u.Open(kek, pin))
}

func TestRoundTrip(t *testing.T) {
	k := newKeyring(t, 1)
	pin := k.Pin()
	again := reopen(t, k, newKEK(t, 1), &pin)
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
	first := k.Pin()
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
