package keyring

import (
	"bytes"
	"slices"
	"sync/atomic"

	"github.com/beezy-dev/kleidi/seal"
)

// Keyring is an open keyring. It never changes, so any number of goroutines may
// use it; a change makes a new one. Keyrings made of one another share their
// KEKs, and each is closed on its own.
type Keyring struct {
	raw     []byte
	doc     *body1
	kek     *shared
	staged  *shared // nil if none is staged or it was not opened
	seeds   map[seal.KeyID]*dekSeeds
	current *dekSeeds
	closed  atomic.Bool
}

// add takes the KEK of the first call for the current one.
func (k *Keyring) add(d *dekSeeds) {
	if k.current == nil {
		k.current = d
	}
	k.seeds[d.id] = d
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
func (k *Keyring) Slots() []seal.Slot { return cloneSlots(k.doc.Current.Slots) }

// StagedSlots returns the slots of the staged KEK; there are none if none is staged.
func (k *Keyring) StagedSlots() []seal.Slot { return stagedSlots(k.doc) }

// Nodes returns the nodes.
func (k *Keyring) Nodes() []Node { return slices.Clone(k.doc.Nodes) }

// Anchor returns what a node that trusts this keyring anchors.
func (k *Keyring) Anchor() Anchor {
	return Anchor{ClusterID: k.doc.ClusterID, KeyID: k.doc.Current.KeyID, Revision: k.doc.Revision}
}

// Info describes the keyring.
func (k *Keyring) Info() Info { return k.doc.info() }

// Holds reports whether Decrypt knows the key ID.
func (k *Keyring) Holds(id seal.KeyID) bool { return k.seeds[id] != nil }

// Encrypt encrypts a DEK seed of 1 to [MaxPlaintext] bytes under the current KEK
// and returns that KEK's ID with it. Other sizes are seal.ErrMalformed.
func (k *Keyring) Encrypt(plaintext []byte) (ciphertext []byte, id seal.KeyID, err error) {
	ciphertext, err = k.current.encrypt(plaintext)
	if err != nil {
		return nil, "", err
	}
	return ciphertext, k.current.id, nil
}

// Decrypt decrypts what Encrypt returned for id. The error is
// seal.ErrUnknownKey, seal.ErrMalformed or seal.ErrAuthentication.
func (k *Keyring) Decrypt(id seal.KeyID, ciphertext []byte) ([]byte, error) {
	d := k.seeds[id]
	if d == nil {
		return nil, seal.ErrUnknownKey
	}
	return d.decrypt(ciphertext)
}

// Close gives the KEKs back, unless another keyring shares them. Closing twice
// is harmless. Encrypt and Decrypt go on working, so that a call that a reload
// overtakes ends well: their ciphers live until the keyring is unreachable.
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

func stagedSlots(b *body1) []seal.Slot {
	if b.Staged == nil {
		return nil
	}
	return cloneSlots(b.Staged.Slots)
}

func cloneSlots(slots []seal.Slot) []seal.Slot {
	out := slices.Clone(slots)
	for i := range out {
		out[i].Data = bytes.Clone(out[i].Data)
	}
	return out
}
