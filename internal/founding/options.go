package founding

import (
	"github.com/beezy-dev/kleidi/seal"
)

// InitOptions says what init makes, and how.
type InitOptions struct {
	// Recipients are age public keys for the recovery slot. Without any, init makes an
	// identity, and Prompter hands it to the operator.
	Recipients []string
	// NoRecovery makes no recovery slot.
	NoRecovery bool
	// Import is the token of kleidi 1.x that also wraps the KEK, or nil.
	Import *Import
	// GenerateKey makes the configured token generate its key first.
	GenerateKey bool
	// BreakTwoOfTwo allows a recovery slot that alone opens the KEK, although
	// unlock.order demands two wrappers.
	BreakTwoOfTwo bool
	Prompter      Prompter
	// Progress receives each step; it may be nil.
	Progress func(step string)
}

// Prompter asks the person at the terminal.
type Prompter interface {
	// ShowIdentity shows a recovery identity once. It refuses if the identity would
	// stay on this machine.
	ShowIdentity(identity *seal.Secret) error
	// AskIdentity asks the operator to type the identity, without showing it.
	AskIdentity() ([]byte, error)
	// Tell shows a fault before the next question.
	Tell(message string)
}

// InitResult is the output of init.
type InitResult struct {
	ClusterID seal.ClusterID `json:"clusterID"`
	KeyID     seal.KeyID     `json:"keyID"`
	Keyring   string         `json:"keyring"`
	Node      string         `json:"node"`
	EK        string         `json:"ek,omitempty"` // if there is a TPM slot
	Slots     []string       `json:"slots"`
	// PKCS11 is what --import-config adds to the configuration.
	PKCS11 *TokenSettings `json:"pkcs11,omitempty"`
}
