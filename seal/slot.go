package seal

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
)

// KEKSize is the size of a KEK in bytes.
const KEKSize = 32

// ClusterID is 16 random bytes made once by init. Everything that a keyring
// holds is bound to it.
type ClusterID [16]byte

// String returns the cluster ID as 32 lower-case hexadecimal digits.
func (c ClusterID) String() string { return hex.EncodeToString(c[:]) }

// ParseClusterID reads what String writes, and nothing else.
func ParseClusterID(s string) (ClusterID, error) {
	var c ClusterID
	if len(s) != 2*len(c) {
		return c, fmt.Errorf("cluster ID has %d characters, want %d", len(s), 2*len(c))
	}
	if _, err := hex.Decode(c[:], []byte(s)); err != nil {
		return c, fmt.Errorf("cluster ID: %w", err)
	}
	if c.String() != s {
		return ClusterID{}, fmt.Errorf("cluster ID is not in lower case")
	}
	return c, nil
}

// MarshalText implements encoding.TextMarshaler.
func (c ClusterID) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (c *ClusterID) UnmarshalText(b []byte) (err error) {
	*c, err = ParseClusterID(string(b))
	return err
}

// KeyID is the KMS v2 key_id: a commitment to one KEK of one cluster, so that
// it can never name another. It is no secret.
type KeyID string

// Wrapper types, as they stand in Slot.Type and in configuration.
const (
	TypeTPM      = "tpm"
	TypePKCS11   = "pkcs11"
	TypeVault    = "vault"
	TypeRecovery = "recovery"

	// Two of two: both wrappers are needed to open the slot, see package both.
	TypeTPMAndPKCS11 = "tpm-and-pkcs11"
	TypeTPMAndVault  = "tpm-and-vault"

	// TypeSkipped marks the place of a slot that could not be made. No wrapper
	// opens it, and configuration never names it.
	TypeSkipped = "skipped"
)

// Slot is one KEK, wrapped once by one wrapper. It is untrusted until the KEK
// that comes out of it has matched its key ID and the keyring's MAC.
type Slot struct {
	// Type is the type of the wrapper that made the slot.
	Type string `json:"type"`
	// Node names the control-plane machine that the slot is for; it is empty
	// where any holder of the wrapper may open the slot.
	Node string `json:"node,omitempty"`
	// Data is the wrapper's own document: ciphertext and identifiers, a JSON
	// object of at most MaxSlotData bytes.
	Data json.RawMessage `json:"data"`
}

// MaxSlotData bounds Slot.Data, in bytes.
const MaxSlotData = 64 << 10

// Wrapper wraps and unwraps KEKs. Implementations are safe for concurrent use
// and hold no session, handle or connection between calls.
type Wrapper interface {
	// Type is one of the Type constants.
	Type() string
	// Wrap seals kek, which it neither keeps nor closes.
	Wrap(ctx context.Context, kek *Secret) (Slot, error)
	// Unwrap opens a slot; the caller closes the Secret. A slot that this
	// wrapper did not make is [ErrNotMine], and the next slot may be tried;
	// every other failure is a [*Error] with its cause.
	Unwrap(ctx context.Context, slot Slot) (*Secret, error)
}
