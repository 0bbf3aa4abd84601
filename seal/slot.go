package seal

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
)

// ClusterID identifies a cluster: 16 random bytes, generated once by init.
// Everything in a keyring is bound to its cluster ID.
type ClusterID [16]byte

// String returns the cluster ID as 32 lower-case hexadecimal digits.
func (c ClusterID) String() string { return hex.EncodeToString(c[:]) }

// ParseClusterID parses the result of String. It accepts no other form.
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

// KeyID is the key_id of KMS v2. It commits to one KEK of one cluster, so it can
// never name another KEK. It is not secret.
type KeyID string

// Wrapper types, as they stand in Slot.Type and in configuration.
const (
	TypeTPM       = "tpm"
	TypePKCS11    = "pkcs11"
	TypeVault     = "vault"
	TypeKMSPlugin = "kms-plugin"
	TypeRecovery  = "recovery"

	// Two of two: both wrappers are needed to open the slot, see package both.
	TypeTPMAndPKCS11    = "tpm-and-pkcs11"
	TypeTPMAndVault     = "tpm-and-vault"
	TypeTPMAndKMSPlugin = "tpm-and-kms-plugin"

	// TypeSkipped marks the place of a slot that could not be made. No wrapper
	// opens it, and configuration never names it.
	TypeSkipped = "skipped"
	// TypeUnrevoked records which copies of former slots their TPM could not be told to
	// refuse. No wrapper opens it, and configuration never names it.
	TypeUnrevoked = "unrevoked"
)

// Slot is one KEK, wrapped once by one wrapper. It is untrusted until the unwrapped
// KEK has matched its key ID and verified the keyring's MAC.
type Slot struct {
	// Type is the type of the wrapper that made the slot.
	Type string `json:"type"`
	// Node names the control-plane machine that may open the slot. It is empty if
	// every machine with the wrapper may open it.
	Node string `json:"node,omitempty"`
	// Data is a JSON object of at most MaxSlotData bytes, in a format of the wrapper.
	// It holds ciphertext and identifiers.
	Data json.RawMessage `json:"data"`
}

// MaxSlotData is the maximum size of Slot.Data in bytes.
const MaxSlotData = 64 << 10

// Wrapper wraps and unwraps KEKs. Implementations are safe for concurrent use and
// keep no session, handle or connection open between calls.
type Wrapper interface {
	// Type is one of the Type constants.
	Type() string
	// Wrap wraps kek. It neither keeps nor closes it.
	Wrap(ctx context.Context, kek *Secret) (Slot, error)
	// Unwrap unwraps the KEK of a slot; the caller closes it. The error is
	// [ErrNotMine] if another wrapper made the slot, and a [*Error] with its cause
	// otherwise.
	Unwrap(ctx context.Context, slot Slot) (*Secret, error)
}
