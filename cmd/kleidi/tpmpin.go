package main

import (
	"context"

	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/tpm/nv"
)

// tpmPin keeps the pin in the TPM. It implements unlock.Pin.
type tpmPin struct{ *nv.PinStore }

// Load implements unlock.Pin. It returns a pin or an error.
func (p tpmPin) Load(ctx context.Context) (*keyring.Pin, error) {
	b, err := p.PinStore.Load(ctx)
	if err != nil {
		return nil, err
	}
	pin, err := keyring.PinOf(b)
	return &pin, err
}

// Save implements unlock.Pin.
func (p tpmPin) Save(ctx context.Context, pin keyring.Pin) error {
	b, err := pin.Bytes()
	if err != nil {
		return err
	}
	return p.PinStore.Save(ctx, b)
}

// Replace implements unlock.Pin.
func (p tpmPin) Replace(ctx context.Context, pin keyring.Pin) error {
	b, err := pin.Bytes()
	if err != nil {
		return err
	}
	return p.PinStore.Replace(ctx, b)
}
