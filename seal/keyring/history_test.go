package keyring

import (
	"bytes"
	"fmt"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
)

// history returns a stored keyring with n retired KEKs. The first byte of the current
// KEK is 1. The retired KEK i is oldKEK(i).
func history(t testing.TB, n int) []byte {
	t.Helper()
	kek := newKEK(t, 1)
	doc := document{Format: format1, ClusterID: cluster, Revision: uint64(n + 1), Nodes: nodes,
		Current: slotted{KeyID: NewKeyID(cluster, kek), Created: newStamp(now), Slots: slots("one")}}
	var file []byte
	withKEK(kek, func(b []byte) {
		c := aead(b, labelRetired)
		for i := range n {
			withKEK(oldKEK(t, i), func(old []byte) {
				r := retired{KeyID: keyID(cluster, old), Created: newStamp(now), Retired: newStamp(now)}
				r.Sealed = c.Seal(nil, nil, old, retiredAAD(cluster, r.KeyID, doc.Current.KeyID))
				doc.Retired = append(doc.Retired, r)
			})
		}
		body := must[[]byte](t)(encodeBody(&doc))
		file = must[[]byte](t)(encode(envelope{Body: body, MAC: bodyMAC(b, body)}))
	})
	return append(file, '\n')
}

// oldKEK returns the retired KEK i of history: its first byte is 2+i, its last i>>7.
func oldKEK(t testing.TB, i int) *seal.Secret {
	kek := newKEK(t, byte(2+i))
	kek.With(func(b []byte) { b[seal.KEKSize-1] = byte(i >> 7) })
	return kek
}

// TestEachRetiredKEKIsChecked: the keyring opens only if each of many retired KEKs
// matches its key ID, although their ciphers are made later.
func TestEachRetiredKEKIsChecked(t *testing.T) {
	const n = 40
	u := must[*Untrusted](t)(Parse(history(t, n)))
	kek := newKEK(t, 1)
	other := bytes.Repeat([]byte{0xEE}, seal.KEKSize)
	for i := range n {
		doc := *u.doc
		doc.Retired = append([]retired{}, u.doc.Retired...)
		withKEK(kek, func(b []byte) { // someone who knows the current KEK replaces a retired one
			r := &doc.Retired[i]
			r.Sealed = aead(b, labelRetired).Seal(nil, nil, other, retiredAAD(cluster, r.KeyID, doc.Current.KeyID))
		})
		_, err := open(forge(t, must[[]byte](t)(encodeBody(&doc)), kek), kek, nil)
		wantRefusal(t, err, seal.CauseKeyringCorrupt, string(doc.Retired[i].KeyID))
	}
}

// TestRetiredKEKsDecrypt: a retired KEK decrypts after the keyring is opened. On a
// closed keyring it decrypts if it was used before.
func TestRetiredKEKsDecrypt(t *testing.T) {
	const n = 5
	u := must[*Untrusted](t)(Parse(history(t, n)))
	k := must[*Keyring](t)(u.Open(newKEK(t, 1), nil))
	ciphertext := func(i int) (seal.KeyID, []byte) {
		id := u.doc.Retired[i].KeyID
		var c []byte
		withKEK(oldKEK(t, i), func(b []byte) { c = must[[]byte](t)(newSeedCipher(cluster, id, b).encrypt([]byte{byte(i)})) })
		return id, c
	}
	decrypts := func(i int) error {
		id, c := ciphertext(i)
		seed, err := k.Decrypt(id, c)
		if err == nil && !bytes.Equal(seed, []byte{byte(i)}) {
			t.Errorf("retired KEK %d decrypts to %x", i, seed)
		}
		return err
	}
	for range 2 {
		if err := decrypts(3); err != nil {
			t.Error(err)
		}
	}
	k.Close()
	if err := decrypts(3); err != nil {
		t.Errorf("a KEK that was used before: %v", err)
	}
	if err := decrypts(4); err != ErrClosed {
		t.Errorf("a KEK that was never used: %v", err)
	}
	if _, err := k.Decrypt(u.doc.Retired[4].KeyID, []byte("short")); err != seal.ErrMalformed {
		t.Errorf("a malformed ciphertext: %v", err)
	}
}

// TestOpeningAllocatesLittle: allocations inside seal.Erase are erased one by one,
// which takes most of the time of opening a keyring. HMAC makes three of them.
func TestOpeningAllocatesLittle(t *testing.T) {
	count := func(n int) float64 {
		u, kek := must[*Untrusted](t)(Parse(history(t, n))), newKEK(t, 1)
		return testing.AllocsPerRun(3, func() { must[*Keyring](t)(u.Open(kek, nil)) })
	}
	const n = 200
	if each := (count(n) - count(0)) / n; each > 5 {
		t.Errorf("each retired KEK costs %.1f allocations", each)
	}
}

func BenchmarkHistory(b *testing.B) {
	for _, n := range []int{0, 255} {
		file, kek := history(b, n), newKEK(b, 1)
		b.Run(fmt.Sprintf("Parse/%d", n), func(b *testing.B) {
			for b.Loop() {
				must[*Untrusted](b)(Parse(file))
			}
		})
		u := must[*Untrusted](b)(Parse(file))
		b.Run(fmt.Sprintf("Open/%d", n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				must[*Keyring](b)(u.Open(kek, nil))
			}
		})
	}
}
