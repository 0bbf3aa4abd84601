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

// MaxPinSize bounds a stored pin, in bytes.
const MaxPinSize = 512

// Pin is what a node last trusted. A keyring opens on that node only if it
// holds the pinned KEK, as the current one or among the retired ones, and its
// revision is not below the pinned one.
type Pin struct {
	ClusterID seal.ClusterID
	KeyID     seal.KeyID
	Revision  uint64
}

// pin1 is a stored pin of format 1. Members stand in this order.
type pin1 struct {
	Format    int            `json:"format"`
	ClusterID seal.ClusterID `json:"clusterID"`
	KeyID     seal.KeyID     `json:"keyID"`
	Revision  uint64         `json:"revision"`
}

// Marshal returns the pin as it is stored.
func (p Pin) Marshal() []byte {
	b, err := encode(pin1{Format: format1, ClusterID: p.ClusterID, KeyID: p.KeyID, Revision: p.Revision})
	if err != nil {
		panic(fmt.Sprintf("encode pin: %v", err)) // strings and numbers always encode
	}
	return append(b, '\n')
}

// MarshalJSON returns the pin without the newline of Marshal.
func (p Pin) MarshalJSON() ([]byte, error) { return bytes.TrimSuffix(p.Marshal(), []byte("\n")), nil }

// ParsePin reads what Marshal wrote, and nothing else. An error is a
// [*seal.Error] with cause seal.CausePin.
func ParsePin(b []byte) (Pin, error) {
	p, err := parsePin(b)
	if err != nil {
		return Pin{}, seal.Errorf(seal.CausePin, "run kleidi recover", "parse pin: %w", err)
	}
	return Pin{ClusterID: p.ClusterID, KeyID: p.KeyID, Revision: p.Revision}, nil
}

func parsePin(b []byte) (p pin1, err error) {
	if len(b) > MaxPinSize {
		return p, fmt.Errorf("more than %d bytes", MaxPinSize)
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

// PinBytes is the size of a pin in its binary form.
const PinBytes = 16 + 8 + sha256.Size

// Bytes returns the pin in its binary form, for where space is short: the cluster
// ID, the revision (big-endian) and the HMAC that the key ID spells out.
func (p Pin) Bytes() (b [PinBytes]byte, err error) {
	sum, err := keyIDEncoding.DecodeString(strings.TrimPrefix(string(p.KeyID), keyIDPrefix))
	if err != nil || !validKeyID(p.KeyID) {
		return b, errors.New("malformed key ID")
	}
	copy(b[:], slices.Concat(p.ClusterID[:], binary.BigEndian.AppendUint64(nil, p.Revision), sum))
	return b, nil
}

// PinOf reads what Bytes returned. An error is a [*seal.Error] with cause
// seal.CausePin.
func PinOf(b [PinBytes]byte) (Pin, error) {
	p := Pin{ClusterID: seal.ClusterID(b[:16]), Revision: binary.BigEndian.Uint64(b[16:24]), KeyID: seal.KeyID(keyIDPrefix + keyIDEncoding.EncodeToString(b[24:]))}
	if _, err := ParsePin(p.Marshal()); err != nil {
		return Pin{}, err
	}
	return p, nil
}
