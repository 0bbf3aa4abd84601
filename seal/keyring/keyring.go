package keyring

import (
	"bytes"
	"errors"
	"slices"
	"sync/atomic"

	"github.com/beezy-dev/kleidi/seal"
)

// Keyring is an open keyring. It is immutable, so its methods may be called
// concurrently; a change returns a new Keyring. A Keyring and its successors share
// their KEKs. Each must be closed.
type Keyring struct {
	raw     []byte // body, MAC and, if there is one, the node's own section, as stored
	body    []byte
	mac     []byte
	doc     *document
	own     *section2 // nil in format 1, and in the cluster store's keyring
	kek     *shared
	staged  *shared // nil if no KEK is staged, or the staged one is not open
	seeds   map[seal.KeyID]*dekSeeds
	current *seedCipher
	closed  atomic.Bool
}

// ErrClosed says that the keyring is closed, so that its KEKs can't be used any longer.
var ErrClosed = errors.New("the keyring is closed")

// addSeeds adds the cipher of a KEK.
func addSeeds(k *Keyring, id seal.KeyID, c *seedCipher) {
	d := new(dekSeeds)
	d.cipher.Store(c)
	k.seeds[id] = d
}

// addRetired adds the retired KEKs. Decrypt makes their ciphers.
func addRetired(k *Keyring) {
	all := make([]dekSeeds, len(k.doc.Retired))
	for i, r := range k.doc.Retired {
		all[i].retired = k.doc.Retired[i : i+1]
		k.seeds[r.KeyID] = &all[i]
	}
}

// Marshal returns the keyring in its stored form.
func (k *Keyring) Marshal() []byte { return bytes.Clone(k.raw) }

// KEK returns the current KEK. The keyring owns it: the caller must neither close it
// nor use it after Close.
func (k *Keyring) KEK() *seal.Secret { return k.kek.secret }

// StagedKEK returns the staged KEK, or nil if none is staged or it is not open. The
// keyring owns it: the caller must neither close it nor use it after Close.
func StagedKEK(k *Keyring) *seal.Secret {
	if k.staged == nil {
		return nil
	}
	return k.staged.secret
}

// CurrentID returns the key ID of the current KEK.
func (k *Keyring) CurrentID() seal.KeyID { return k.doc.Current.KeyID }

// Revision returns the revision, which every change of the body raises.
func (k *Keyring) Revision() uint64 { return k.doc.Revision }

// ClusterID returns the cluster that the keyring belongs to.
func (k *Keyring) ClusterID() seal.ClusterID { return k.doc.ClusterID }

// Slots returns the slots of the current KEK.
func (k *Keyring) Slots() []seal.Slot { return viewOf(&k.doc.Current, k.own) }

// StagedSlots returns the slots of the staged KEK, or nil if no KEK is staged.
func (k *Keyring) StagedSlots() []seal.Slot { return viewOf(k.doc.Staged, k.own) }

// Nodes returns the nodes in the keyring.
func (k *Keyring) Nodes() []Node { return slices.Clone(k.doc.Nodes) }

// Anchor returns the anchor of a node that trusts this keyring.
func (k *Keyring) Anchor() Anchor {
	return Anchor{ClusterID: k.doc.ClusterID, KeyID: k.doc.Current.KeyID, Revision: k.doc.Revision}
}

// Info describes the keyring for display.
func (k *Keyring) Info() Info { return k.doc.info(k.own) }

// Holds reports whether the keyring holds the KEK with this ID, open.
func (k *Keyring) Holds(id seal.KeyID) bool { return k.seeds[id] != nil }

// Encrypt encrypts a DEK seed of 1 to [MaxPlaintext] bytes under the current KEK, and
// returns the ciphertext and that KEK's ID. The error is seal.ErrMalformed for other
// sizes.
func (k *Keyring) Encrypt(plaintext []byte) (ciphertext []byte, id seal.KeyID, err error) {
	ciphertext, err = k.current.encrypt(plaintext)
	if err != nil {
		return nil, "", err
	}
	return ciphertext, k.CurrentID(), nil
}

// Decrypt decrypts a ciphertext that Encrypt returned with id. The error is
// seal.ErrUnknownKey, seal.ErrMalformed or seal.ErrAuthentication, and may be
// [ErrClosed] on a closed keyring; see Close.
func (k *Keyring) Decrypt(id seal.KeyID, ciphertext []byte) ([]byte, error) {
	d := k.seeds[id]
	if d == nil {
		return nil, seal.ErrUnknownKey
	}
	if !wellFormed(ciphertext) {
		return nil, seal.ErrMalformed
	}
	c, err := cipherOf(k, d)
	if err != nil {
		return nil, err
	}
	return c.decrypt(ciphertext)
}

// Close closes the KEKs that no other keyring shares. A second Close does nothing.
// Encrypt works on a closed keyring, and so does Decrypt under a KEK that was used
// before, because their ciphers live until the keyring is unreachable. If a reload
// closes the keyring during a Decrypt, which then fails with [ErrClosed], the caller
// repeats it on the new keyring.
func (k *Keyring) Close() {
	if k.closed.Swap(true) {
		return
	}
	k.kek.release()
	k.staged.release()
}

// shared is a Secret that several keyrings share. The last one closes it.
type shared struct {
	secret *seal.Secret
	refs   atomic.Int32
}

// share returns s as a shared Secret that no keyring holds yet.
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
