package keyring

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/beezy-dev/kleidi/seal"
)

// MaxAnchorSize is the maximum size of a stored anchor in bytes.
const MaxAnchorSize = 512

// Anchor names the KEK and the revision that a node last trusted. The node opens a
// keyring only if the anchored KEK is its current KEK or one of its retired KEKs,
// and if its revision is not below the anchored one.
type Anchor struct {
	ClusterID seal.ClusterID
	KeyID     seal.KeyID
	Revision  uint64
}

// pin1 is a stored anchor of format 1. The order of the members is part of the format.
type pin1 struct {
	Format    int            `json:"format"`
	ClusterID seal.ClusterID `json:"clusterID"`
	KeyID     seal.KeyID     `json:"keyID"`
	Revision  uint64         `json:"revision"`
}

// Marshal returns the anchor in its stored form.
func (p Anchor) Marshal() []byte {
	b, err := encode(pin1{Format: format1, ClusterID: p.ClusterID, KeyID: p.KeyID, Revision: p.Revision})
	if err != nil {
		panic(fmt.Sprintf("encode anchor: %v", err)) // strings and numbers always encode
	}
	return append(b, '\n')
}

// MarshalJSON returns the anchor without the newline of Marshal.
func (p Anchor) MarshalJSON() ([]byte, error) {
	return bytes.TrimSuffix(p.Marshal(), []byte("\n")), nil
}

// ParseAnchor parses the result of Marshal. It accepts no other form. An error is a
// [*seal.Error] with cause seal.CauseAnchor.
func ParseAnchor(b []byte) (Anchor, error) {
	p, err := parseAnchor(b)
	if err != nil {
		return Anchor{}, seal.Errorf(seal.CauseAnchor, "put the anchor file back", "parse anchor: %w", err).OrRecover()
	}
	return Anchor{ClusterID: p.ClusterID, KeyID: p.KeyID, Revision: p.Revision}, nil
}

func parseAnchor(b []byte) (p pin1, err error) {
	if len(b) > MaxAnchorSize {
		return p, fmt.Errorf("more than %d bytes", MaxAnchorSize)
	}
	b, ended := bytes.CutSuffix(b, []byte("\n"))
	if !ended {
		return p, errors.New("truncated: no newline at the end")
	}
	if err := decode(b, &p); err != nil {
		return p, err
	}
	switch {
	case p.Format != format1:
		return p, fmt.Errorf("format is %d, want %d", p.Format, format1)
	case !validKeyID(p.KeyID):
		return p, errors.New("malformed key ID")
	case p.Revision == 0 || p.Revision > MaxRevision:
		return p, fmt.Errorf("revision %d is not between 1 and %d", p.Revision, uint64(MaxRevision))
	}
	return p, nil
}

// AnchorBytes is the size of an anchor in its binary form.
const AnchorBytes = 16 + 8 + sha256.Size

// Bytes returns the anchor in its binary form, which is shorter than the stored one:
// the cluster ID, the revision (big-endian) and the HMAC that the key ID encodes.
func (p Anchor) Bytes() (b [AnchorBytes]byte, err error) {
	sum, err := keyIDEncoding.DecodeString(strings.TrimPrefix(string(p.KeyID), keyIDPrefix))
	if err != nil || !validKeyID(p.KeyID) {
		return b, errors.New("malformed key ID")
	}
	copy(b[:], slices.Concat(p.ClusterID[:], binary.BigEndian.AppendUint64(nil, p.Revision), sum))
	return b, nil
}

// AnchorOf parses the result of Bytes. An error is a [*seal.Error] with cause
// seal.CauseAnchor.
func AnchorOf(b [AnchorBytes]byte) (Anchor, error) {
	p := Anchor{ClusterID: seal.ClusterID(b[:16]), Revision: binary.BigEndian.Uint64(b[16:24]), KeyID: seal.KeyID(keyIDPrefix + keyIDEncoding.EncodeToString(b[24:]))}
	if _, err := ParseAnchor(p.Marshal()); err != nil {
		return Anchor{}, err
	}
	return p, nil
}
