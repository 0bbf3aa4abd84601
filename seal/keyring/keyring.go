package keyring

import (
	"bytes"
	"errors"
	"slices"
	"sync/atomic"

	"github.com/beezy-dev/kleidi/seal"
)

// Keyring is an open keyring. It never changes, so any number of goroutines may
// use it; a change makes a new one. Keyrings made of one another share their
// KEKs, and each is closed on its own.
type Keyring struct {
	raw     []byte // body, MAC and, if there is one, own section, as stored
	body    []byte
	mac     []byte
	doc     *document
	own     *section2 // nil in format 1, and in what the cluster store holds
	kek     *shared
	staged  *shared // nil if none is staged or it was not opened
	seeds   map[seal.KeyID]*dekSeeds
	current *seedCipher
	closed  atomic.Bool
}

// ErrClosed: the keyring was closed before it had made the cipher of a retired KEK.
var ErrClosed = errors.New("the keyring is closed")

// add adds a KEK by its cipher.
func (k *Keyring) add(id seal.KeyID, c *seedCipher) {
	d := new(dekSeeds)
	d.cipher.Store(c)
	k.seeds[id] = d
}

// addRetired adds the retired KEKs, whose ciphers are made later.
func (k *Keyring) addRetired() {
	all := make([]dekSeeds, len(k.doc.Retired))
	for i, r := range k.doc.Retired {
		all[i].retired = k.doc.Retired[i : i+1]
		k.seeds[r.KeyID] = &all[i]
	}
}

// Marshal returns the keyring as it is stored.
func (k *Keyring) Marshal() []byte { return bytes.Clone(k.raw) }

// KEK returns the current KEK, which stays the keyring's: it is good until
// Close, and the caller doesn't close it.
func (k *Keyring) KEK() *seal.Secret { return k.kek.secret }

// CurrentID returns the key ID of the current KEK.
func (k *Keyring) CurrentID() seal.KeyID { return k.doc.Current.KeyID }

// Revision returns the revision, which every change raises.
func (k *Keyring) Revision() uint64 { return k.doc.Revision }

// ClusterID returns the cluster that the keyring belongs to.
func (k *Keyring) ClusterID() seal.ClusterID { return k.doc.ClusterID }

// Slots returns the slots of the current KEK.
func (k *Keyring) Slots() []seal.Slot { return viewOf(&k.doc.Current, k.own) }

// StagedSlots returns the slots of the staged KEK; there are none if none is staged.
func (k *Keyring) StagedSlots() []seal.Slot { return viewOf(k.doc.Staged, k.own) }

// Nodes returns the nodes.
func (k *Keyring) Nodes() []Node { return slices.Clone(k.doc.Nodes) }

// Anchor returns what a node that trusts this keyring anchors.
func (k *Keyring) Anchor() Anchor {
	return Anchor{ClusterID: k.doc.ClusterID, KeyID: k.doc.Current.KeyID, Revision: k.doc.Revision}
}

// Info describes the keyring.
func (k *Keyring) Info() Info { return k.doc.info(k.own) }

// Holds reports whether Decrypt knows the key ID.
func (k *Keyring) Holds(id seal.KeyID) bool { return k.seeds[id] != nil }

// Encrypt encrypts a DEK seed of 1 to [MaxPlaintext] bytes under the current KEK
// and returns that KEK's ID with it. Other sizes are seal.ErrMalformed.
func (k *Keyring) Encrypt(plaintext []byte) (ciphertext []byte, id seal.KeyID, err error) {
	ciphertext, err = k.current.encrypt(plaintext)
	if err != nil {
		return nil, "", err
	}
	return ciphertext, k.CurrentID(), nil
}

// Decrypt decrypts what Encrypt returned for id. The error is
// seal.ErrUnknownKey, seal.ErrMalformed or seal.ErrAuthentication; on a closed
// keyring it may be [ErrClosed], see Close.
func (k *Keyring) Decrypt(id seal.KeyID, ciphertext []byte) ([]byte, error) {
	d := k.seeds[id]
	if d == nil {
		return nil, seal.ErrUnknownKey
	}
	if !wellFormed(ciphertext) {
		return nil, seal.ErrMalformed
	}
	c, err := k.cipherOf(d)
	if err != nil {
		return nil, err
	}
	return c.decrypt(ciphertext)
}

// Close gives the KEKs back, unless another keyring shares them. Closing twice
// is harmless. Encrypt goes on working, and so does Decrypt under a KEK that was
// used before: their ciphers live until the keyring is unreachable. A call that a
// reload overtakes and that gets [ErrClosed] is for the newer keyring.
func (k *Keyring) Close() {
	if k.closed.Swap(true) {
		return
	}
	k.kek.release()
	k.staged.release()
}

// shared is a Secret that is closed with the last keyring that holds it.
type shared struct {
	secret *seal.Secret
	refs   atomic.Int32
}

// share returns a Secret that no keyring holds yet.
func share(s *seal.Secret) *shared { return &shared{secret: s} }

func (h *shared) retain() *shared {
	h.refs.Add(1)
	return h
}

func (h *shared) release() {
	if h != nil && h.refs.Add(-1) == 0 {
		h.secret.Close()
	}
}

func cloneSlots(slots []seal.Slot) []seal.Slot {
	out := slices.Clone(slots)
	for i := range out {
		out[i].Data = bytes.Clone(out[i].Data)
	}
	return out
}
