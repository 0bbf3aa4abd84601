package main

import (
	"context"
	"crypto"
	"errors"

	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/nv"
)

// tpmPin keeps the pin in the TPM. It implements unlock.Pin: nobody can write the
// pin who boots with other values of some PCRs than the machine has now.
type tpmPin struct {
	index  *nv.Pin
	device *tpm.Device
	owner  tpm.Owner
	bank   crypto.Hash
	pcrs   []int
}

// do runs f with what the running boot demands of the index.
func (p tpmPin) do(ctx context.Context, f func(transport.TPM, *tpm.SRK, authpolicy.Terms) error) error {
	err := p.device.Do(ctx, func(t transport.TPM) error {
		values, err := tpm.ReadPCRs(t, p.bank, p.pcrs)
		if err != nil {
			return err
		}
		return tpm.WithSRK(t, p.owner, nil, func(srk *tpm.SRK) error {
			return f(t, srk, authpolicy.Terms{authpolicy.PCR{Bank: p.bank, Values: values}})
		})
	})
	if err != nil && seal.CauseOf(err) == "" {
		return seal.Errorf(seal.CauseUnavailable, "see tpm.device; kleidi serve tries again", "the pin in the TPM: %w", err)
	}
	return err
}

// Load implements unlock.Pin. That there is none is an error, unlike with a file:
// someone may have removed it.
func (p tpmPin) Load(ctx context.Context) (*keyring.Pin, error) {
	var pin keyring.Pin
	err := p.do(ctx, func(t transport.TPM, srk *tpm.SRK, terms authpolicy.Terms) error {
		b, err := p.index.Read(t, srk, terms)
		if err != nil {
			return err
		}
		pin, err = keyring.PinOf(b)
		return err
	})
	if err != nil {
		return nil, err
	}
	return &pin, nil
}

// Save implements unlock.Pin. What is there already is not written again: NV
// memory wears out.
func (p tpmPin) Save(ctx context.Context, pin keyring.Pin) error {
	return p.save(ctx, pin, nil)
}

// Replace implements unlock.Pin. It makes the index anew where another one stands
// in its place.
func (p tpmPin) Replace(ctx context.Context, pin keyring.Pin) error {
	return p.save(ctx, pin, func(t transport.TPM, srk *tpm.SRK, terms authpolicy.Terms, err error) error {
		if errors.Is(err, nv.ErrPinMissing) || errors.Is(err, nv.ErrPinReplaced) {
			return p.index.Replace(t, srk, terms)
		}
		return nil
	})
}

func (p tpmPin) save(ctx context.Context, pin keyring.Pin, prepare func(transport.TPM, *tpm.SRK, authpolicy.Terms, error) error) error {
	want, err := pin.Bytes()
	if err != nil {
		return err
	}
	return p.do(ctx, func(t transport.TPM, srk *tpm.SRK, terms authpolicy.Terms) error {
		now, err := p.index.Read(t, srk, terms)
		if err == nil && now == want {
			return nil
		}
		if prepare != nil {
			if err := prepare(t, srk, terms, err); err != nil {
				return err
			}
		}
		return p.index.Write(t, srk, terms, want)
	})
}
