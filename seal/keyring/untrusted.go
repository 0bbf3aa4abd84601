package keyring

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"

	"github.com/beezy-dev/kleidi/seal"
)

const (
	hintRestore = "run kleidi keyring restore --previous, or kleidi keyring restore BACKUP"
	hintNotMine = "if this change was not yours, " + hintRestore
)

// Untrusted is a keyring that parses. Nothing in it is authenticated: an attacker
// who can write the file may have chosen all of its content.
type Untrusted struct {
	raw  []byte
	body []byte // as stored; the MAC covers it
	mac  []byte
	doc  *document

	section    []byte // as stored; the section's MAC covers it; nil if there is no section
	sectionMAC []byte
	own        *section2
}

// Parse parses a keyring. It accepts only the canonical encoding, which
// [Keyring.Marshal] returns, within the limits of the format. An error is a
// [*seal.Error] with cause seal.CauseKeyringCorrupt.
func Parse(b []byte) (*Untrusted, error) {
	u, err := parse(b)
	if err != nil {
		hint := hintRestore
		if errors.Is(err, ErrNewerFormat) {
			hint = "install the version of kleidi that wrote it, or a later one"
		}
		return nil, seal.Errorf(seal.CauseKeyringCorrupt, hint, "parse keyring: %w", err)
	}
	return u, nil
}

var ErrNewerFormat = errors.New("unknown format")

func parse(b []byte) (*Untrusted, error) {
	if len(b) > MaxSize {
		return nil, fmt.Errorf("more than %d bytes", MaxSize)
	}
	var e envelope
	file, ended := bytes.CutSuffix(b, []byte("\n"))
	if !ended {
		return nil, errors.New("truncated: no newline at the end")
	}
	if err := decode(file, &e); err != nil {
		return nil, err
	}
	if len(e.MAC) != sha256.Size {
		return nil, fmt.Errorf("mac has %d bytes, want %d", len(e.MAC), sha256.Size)
	}
	u := &Untrusted{raw: bytes.Clone(b), body: e.Body, mac: e.MAC, section: e.Section, sectionMAC: e.SectionMAC}
	var err error
	if u.doc, err = parseBody(e.Body); err != nil {
		return nil, err
	}
	if e.Section == nil && e.SectionMAC == nil {
		return u, nil
	}
	if u.own, err = parseBeside(&e, u.doc); err != nil {
		return nil, fmt.Errorf("own section: %w", err)
	}
	return u, nil
}

// parseBeside parses the node's own section beside a shared keyring.
func parseBeside(e *envelope, doc *document) (*section2, error) {
	switch {
	case doc.Format != format2:
		return nil, fmt.Errorf("format %d has none", doc.Format)
	case len(e.SectionMAC) != sha256.Size:
		return nil, fmt.Errorf("sectionMAC has %d bytes, want %d", len(e.SectionMAC), sha256.Size)
	}
	s, err := parseSection2(e.Section)
	if err != nil {
		return nil, err
	}
	return s, s.checkBeside(doc)
}

// ClusterID returns the cluster that the keyring claims.
func (u *Untrusted) ClusterID() seal.ClusterID { return u.doc.ClusterID }

// Revision returns the revision that the keyring claims.
func (u *Untrusted) Revision() uint64 { return u.doc.Revision }

// CurrentID returns the key ID that the keyring claims for its current KEK.
func (u *Untrusted) CurrentID() seal.KeyID { return u.doc.Current.KeyID }

// Slots returns the slots of the current KEK.
func (u *Untrusted) Slots() []seal.Slot { return viewOf(&u.doc.Current, u.own) }

// StagedSlots returns the slots of the staged KEK, or nil if no KEK is staged.
func (u *Untrusted) StagedSlots() []seal.Slot { return viewOf(u.doc.Staged, u.own) }

// Info describes the keyring. Nothing in it is authenticated.
func (u *Untrusted) Info() Info { return u.doc.info(u.own) }

// Format returns the format that the keyring claims.
func (u *Untrusted) Format() int { return u.doc.Format }

// Open returns u as a [Keyring]. kek was unwrapped from a slot. Open accepts it only
// if, in this order:
//
//  1. kek matches the key ID of the current KEK in this cluster;
//  2. the MAC over the body as stored verifies under kek;
//  3. every retired KEK decrypts under kek and matches its own key ID, and the MAC
//     over the node's own section, if there is one, verifies under kek;
//  4. the anchored cluster is this one, and the anchored KEK is the current one or
//     among the retired ones;
//  5. the revision is not below the anchored one.
//
// A nil anchor skips 4 and 5: in recover and verify the operator vouches for the
// keyring. On success the Keyring owns kek; on error the caller does. An error is a
// [*seal.Error] with cause seal.CauseSlotCorrupt (1), seal.CauseKeyringCorrupt
// (2, 3) or seal.CauseAnchor (4, 5).
func (u *Untrusted) Open(kek *seal.Secret, anchor *Anchor) (*Keyring, error) {
	k := newOpen(u)
	err := error(seal.Errorf(seal.CauseSlotCorrupt, hintRestore, "the slot holds no KEK of %d bytes", seal.KEKSize))
	withKEK(kek, func(b []byte) { err = u.open(k, b) })
	if err == nil && anchor != nil {
		err = u.checkAnchor(*anchor)
	}
	if err != nil {
		return nil, err
	}
	k.kek = share(kek).retain()
	return k, nil
}

// newOpen returns the keyring of u, not yet open. It allocates outside [seal.Erase]
// as much as it can, because each allocation inside is slow.
func newOpen(u *Untrusted) *Keyring {
	k := &Keyring{raw: u.raw, body: u.body, mac: u.mac, doc: u.doc, own: u.own, seeds: make(map[seal.KeyID]*dekSeeds, len(u.doc.Retired)+2)}
	addRetired(k)
	return k
}

func (u *Untrusted) open(k *Keyring, kek []byte) error {
	id := u.doc.Current.KeyID
	if got := keyID(u.doc.ClusterID, kek); got != id {
		return seal.Errorf(seal.CauseSlotCorrupt, hintRestore,
			"the slot holds the KEK of key ID %s, but the current KEK of cluster %s has key ID %s", got, u.doc.ClusterID, id)
	}
	if !hmac.Equal(bodyMAC(kek, u.body), u.mac) {
		return seal.Errorf(seal.CauseKeyringCorrupt, hintRestore, "the keyring's MAC does not verify under key ID %s", id)
	}
	k.current = newSeedCipher(u.doc.ClusterID, id, kek)
	addSeeds(k, id, k.current)
	if err := u.doc.eachRetired(kek, func(retired, []byte) error { return nil }); err != nil {
		return err
	}
	if u.own != nil && !hmac.Equal(sectionMAC(kek, u.section), u.sectionMAC) {
		return seal.Errorf(seal.CauseKeyringCorrupt, hintRestore, "the MAC of node %s's own section does not verify under key ID %s", u.own.Node, id)
	}
	return nil
}

// ifMine adds to the hint of e the advice for an operator who made the change.
func ifMine(e *seal.Error) error {
	e.NoRecovery = e.Hint
	e.Hint += "; if it was, run kleidi recover --trust-key-id KEY_ID with the recovery identity"
	return e
}

func (u *Untrusted) checkAnchor(anchor Anchor) error {
	doc := u.doc
	if anchor.ClusterID != doc.ClusterID {
		return seal.Errorf(seal.CauseAnchor, "run kleidi keyring restore FILE with a keyring of the anchored cluster",
			"the keyring is of cluster %s, the anchor is of cluster %s", doc.ClusterID, anchor.ClusterID)
	}
	trusted := anchor.KeyID == doc.Current.KeyID ||
		slices.ContainsFunc(doc.Retired, func(r retired) bool { return r.KeyID == anchor.KeyID })
	if !trusted {
		return ifMine(seal.Errorf(seal.CauseAnchor, hintNotMine,
			"the keyring (key ID %s, revision %d) does not hold the anchored key ID %s (revision %d)",
			doc.Current.KeyID, doc.Revision, anchor.KeyID, anchor.Revision))
	}
	if doc.Revision < anchor.Revision {
		return ifMine(seal.Errorf(seal.CauseAnchor, hintNotMine,
			"the keyring has revision %d, the anchor expects revision %d or later (key ID %s)",
			doc.Revision, anchor.Revision, doc.Current.KeyID))
	}
	return nil
}

func bodyMAC(kek, body []byte) (sum []byte) {
	derive(kek, labelMAC, func(key []byte) { sum = mac(key, body) })
	return sum
}

// retiredAAD binds a retired KEK to its cluster, its key ID and the KEK that seals it.
func retiredAAD(cluster seal.ClusterID, id, current seal.KeyID) []byte {
	return frame(string(cluster[:]), string(id), string(current))
}

// eachRetired decrypts every retired KEK under the current one, kek, and calls f
// with the retired KEK, which f must not keep.
func (b *document) eachRetired(kek []byte, f func(r retired, old []byte) error) error {
	return b.openRetired(b.Retired, kek, f)
}

// openRetired decrypts the retired KEKs in some under the current one, kek. It checks
// that each matches its key ID, and calls f with it. f must not keep it.
func (b *document) openRetired(some []retired, kek []byte, f func(r retired, old []byte) error) error {
	if len(some) == 0 {
		return nil
	}
	c := aead(kek, labelRetired)
	old := make([]byte, 0, seal.KEKSize+gcmOverhead)
	defer func() { clear(old[:cap(old)]) }()
	return withKeyIDMatcher(b.ClusterID, func(matches func(id seal.KeyID, kek []byte) bool) error {
		aad := make([]byte, 0, len(retiredAAD(b.ClusterID, b.Current.KeyID, b.Current.KeyID)))
		cluster, current := string(b.ClusterID[:]), string(b.Current.KeyID)
		for _, r := range some {
			aad = appendFrame(aad[:0], cluster, string(r.KeyID), current)
			plain, err := c.Open(old[:0], nil, r.Sealed, aad)
			if err != nil || !matches(r.KeyID, plain) {
				return seal.Errorf(seal.CauseKeyringCorrupt, hintRestore, "the retired KEK of key ID %s does not open", r.KeyID)
			}
			if err := f(r, plain); err != nil {
				return err
			}
		}
		return nil
	})
}
