package keyring

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/beezy-dev/kleidi/seal"
)

// An archive is a retired KEK that is about to leave the keyring, wrapped for the recovery
// recipients alone. Its MAC is under the KEK that was current then. So a node that still
// holds that KEK knows that kleidi made the archive, and that nothing in it was changed;
// only the recovery identity opens it.

// MaxArchiveSize bounds a whole archive, in bytes.
const MaxArchiveSize = 64 << 10

const archiveFormat1 = 1

// archive1 is an archive of format 1. Members stand in this order.
type archive1 struct {
	Format    int            `json:"format"`
	ClusterID seal.ClusterID `json:"clusterID"`
	KeyID     seal.KeyID     `json:"keyID"`
	Created   stamp          `json:"created"`
	Retired   stamp          `json:"retired"`
	Unused    bool           `json:"unused,omitempty"`
	By        seal.KeyID     `json:"by"` // key ID of the KEK whose MAC covers the archive
	Slots     []seal.Slot    `json:"slots"`
}

// archiveEnvelope is the stored document.
type archiveEnvelope struct {
	Archive []byte `json:"archive"`
	MAC     []byte `json:"mac"`
}

// UntrustedArchive is an archive that parses. Nothing in it is authenticated.
type UntrustedArchive struct {
	raw []byte // as stored; the MAC covers it
	mac []byte
	doc *archive1
}

// ArchiveInfo describes an archive. Nothing in it is authenticated.
type ArchiveInfo struct {
	ClusterID seal.ClusterID
	// KeyID is the key ID of the archived KEK. By is the key ID of the KEK that was
	// current then.
	KeyID, By        seal.KeyID
	Created, Retired time.Time
}

// RetiredKEK returns a copy of a retired KEK, which the caller closes.
func RetiredKEK(k *Keyring, id seal.KeyID, mem seal.Memory) (kek *seal.Secret, err error) {
	if !slices.ContainsFunc(k.doc.Retired, func(r retired) bool { return r.KeyID == id }) {
		return nil, fmt.Errorf("key ID %s is not that of a retired KEK", id)
	}
	err = ErrClosed
	withHeld(k, id, func(b []byte) { kek, err = mem.Take(bytes.Clone(b)) })
	return kek, err
}

// Archive returns the archive of a retired KEK, which the caller has wrapped in slots.
func Archive(k *Keyring, id seal.KeyID, slots []seal.Slot) ([]byte, error) {
	i := slices.IndexFunc(k.doc.Retired, func(r retired) bool { return r.KeyID == id })
	if i < 0 {
		return nil, fmt.Errorf("archive: key ID %s is not that of a retired KEK", id)
	}
	r := k.doc.Retired[i]
	b, err := encode(&archive1{Format: archiveFormat1, ClusterID: k.ClusterID(), KeyID: id, Created: r.Created, Retired: r.Retired, Unused: r.Unused, By: k.CurrentID(), Slots: slots})
	if err != nil {
		return nil, fmt.Errorf("archive: %w", err)
	}
	e := archiveEnvelope{Archive: b}
	if !withKEK(k.kek.secret, func(kek []byte) { e.MAC = archiveMAC(kek, b) }) {
		return nil, fmt.Errorf("archive: %w", ErrClosed)
	}
	file, err := encode(e)
	if err != nil {
		return nil, fmt.Errorf("archive: %w", err)
	}
	file = append(file, '\n')
	if _, err := ParseArchive(file); err != nil { // never write an archive that nobody can read
		return nil, err
	}
	return file, nil
}

// ParseArchive reads an archive. It accepts only the one encoding that [Archive] writes,
// within the limits of the format.
func ParseArchive(b []byte) (*UntrustedArchive, error) {
	u, err := parseArchive(b)
	if err != nil {
		return nil, fmt.Errorf("parse archive: %w", err)
	}
	return u, nil
}

func parseArchive(b []byte) (*UntrustedArchive, error) {
	if len(b) > MaxArchiveSize {
		return nil, fmt.Errorf("more than %d bytes", MaxArchiveSize)
	}
	file, ended := bytes.CutSuffix(b, []byte("\n"))
	if !ended {
		return nil, errors.New("truncated: no newline at the end")
	}
	var e archiveEnvelope
	if err := decode(file, &e); err != nil {
		return nil, err
	}
	if len(e.MAC) != sha256.Size {
		return nil, fmt.Errorf("mac has %d bytes, want %d", len(e.MAC), sha256.Size)
	}
	d := new(archive1)
	if err := decode(e.Archive, d); err != nil {
		return nil, err
	}
	return &UntrustedArchive{raw: e.Archive, mac: e.MAC, doc: d}, d.check()
}

func (d *archive1) check() error {
	switch {
	case d.Format != archiveFormat1:
		return fmt.Errorf("format is %d, want %d", d.Format, archiveFormat1)
	case !validKeyID(d.KeyID) || !validKeyID(d.By):
		return errors.New("malformed key ID")
	case d.KeyID == d.By:
		return errors.New("the archived KEK is the one that was current")
	case len(d.Slots) == 0 || len(d.Slots) > MaxSlots:
		return fmt.Errorf("%d slots, want 1 to %d", len(d.Slots), MaxSlots)
	}
	for i, s := range d.Slots {
		if s.Type != seal.TypeRecovery || s.Node != "" || len(s.Data) > seal.MaxSlotData {
			return fmt.Errorf("slots[%d]: no recovery slot of at most %d bytes", i, seal.MaxSlotData)
		}
	}
	return nil
}

// Info describes the archive.
func (u *UntrustedArchive) Info() ArchiveInfo {
	return ArchiveInfo{u.doc.ClusterID, u.doc.KeyID, u.doc.By, u.doc.Created.Time, u.doc.Retired.Time}
}

// Slots returns the recovery slots of the archived KEK.
func (u *UntrustedArchive) Slots() []seal.Slot { return cloneSlots(u.doc.Slots) }

// ErrForeignArchive means that the archive was made under a KEK that the keyring does not hold, so
// that nothing says who made it.
var ErrForeignArchive = errors.New("the archive was made under a KEK that this keyring does not hold")

// Verify returns nil if a holder of one of k's KEKs made the archive, in k's cluster. The
// error is [ErrForeignArchive] if k does not hold the KEK whose MAC covers the archive.
func (u *UntrustedArchive) Verify(k *Keyring) error {
	if u.doc.ClusterID != k.ClusterID() {
		return fmt.Errorf("the archive is of cluster %s, and the keyring of cluster %s", u.doc.ClusterID, k.ClusterID())
	}
	verified := false
	if !withHeld(k, u.doc.By, func(kek []byte) { verified = hmac.Equal(archiveMAC(kek, u.raw), u.mac) }) {
		return ErrForeignArchive
	}
	if !verified {
		return fmt.Errorf("the archive's MAC does not verify under key ID %s", u.doc.By)
	}
	return nil
}

// Unarchive returns the revision in which an archived KEK is a retired one again. kek was
// unwrapped from one of the archive's slots. The caller must know who made the archive,
// because everything encrypted under the KEK will decrypt.
func Unarchive(k *Keyring, u *UntrustedArchive, kek *seal.Secret) (*Keyring, error) {
	d := u.doc
	switch {
	case d.ClusterID != k.ClusterID():
		return nil, fmt.Errorf("the archive is of cluster %s, and the keyring of cluster %s", d.ClusterID, k.ClusterID())
	case holdsOrStages(k, d.KeyID):
		return nil, fmt.Errorf("the keyring holds key ID %s", d.KeyID)
	case NewKeyID(d.ClusterID, kek) != d.KeyID:
		return nil, fmt.Errorf("the archive holds a KEK other than that of its key ID %s", d.KeyID)
	case len(k.doc.Retired) >= MaxRetired:
		return nil, fmt.Errorf("the keyring holds %d retired KEKs, and no more fit; prune another one first", MaxRetired)
	case k.StagedID() != "" && len(k.doc.Retired)+1 >= MaxRetired: // it, or the current KEK, will be retired
		return nil, fmt.Errorf("the keyring holds %d retired KEKs and a staged one, and no more fit; end the rotation, then prune a retired KEK", len(k.doc.Retired))
	}
	doc := *k.doc
	r := retired{KeyID: d.KeyID, Created: d.Created, Retired: d.Retired, Unused: d.Unused && doc.Format >= format2}
	withKEK(k.kek.secret, func(current []byte) {
		withKEK(kek, func(old []byte) {
			r.Sealed = aead(current, labelRetired).Seal(nil, nil, old, retiredAAD(doc.ClusterID, r.KeyID, doc.Current.KeyID))
		})
	})
	doc.Retired = append(slices.Clone(doc.Retired), r)
	slices.SortStableFunc(doc.Retired, func(a, b retired) int { return a.Retired.Compare(b.Retired.Time) })
	return revise(k, "unarchive", &doc)
}

func archiveMAC(kek, archive []byte) (sum []byte) {
	derive(kek, labelArchive, func(key []byte) { sum = mac(key, archive) })
	return sum
}
