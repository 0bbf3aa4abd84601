package unlock

import (
	"context"
	"errors"
	"io/fs"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// Pin keeps what this node last trusted.
type Pin interface {
	// Load returns the pin, or nil where there is none.
	Load(context.Context) (*keyring.Pin, error)
	// Save replaces the pin durably.
	Save(context.Context, keyring.Pin) error
	// Replace does so whatever is in the pin's place: an operator has vouched for
	// the keyring.
	Replace(context.Context, keyring.Pin) error
}

// FilePin keeps the pin in a file beside the keyring. It stops who can write the
// keyring, through etcd for instance, and not who can write the whole disk.
type FilePin struct{ Store Store }

// Load implements [Pin].
func (p FilePin) Load(ctx context.Context) (*keyring.Pin, error) {
	b, _, err := p.Store.Load(ctx)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, storeError("pin", err)
	}
	pin, err := keyring.ParsePin(b)
	if err != nil {
		return nil, err
	}
	return &pin, nil
}

// Save implements [Pin].
func (p FilePin) Save(ctx context.Context, pin keyring.Pin) error {
	_, version, err := p.Store.Load(ctx)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return storeError("pin", err)
	}
	if _, err := p.Store.Save(ctx, pin.Marshal(), version); err != nil {
		return storeError("pin", err)
	}
	return nil
}

// Replace implements [Pin].
func (p FilePin) Replace(ctx context.Context, pin keyring.Pin) error { return p.Save(ctx, pin) }

func storeError(what string, err error) error {
	if seal.CauseOf(err) != "" {
		return err
	}
	return seal.Errorf(seal.CauseStore, "see the state folder's disk and permissions", "%s: %w", what, err)
}
