package nv

import (
	"context"
	"crypto"
	"errors"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/device"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

// AnchorStore is the anchor of the running boot. Its index demands the present values of
// some PCRs, so a boot with other values cannot write it.
type AnchorStore struct {
	Anchor *Anchor
	Device *device.Device
	Owner  keys.Owner
	Bank   crypto.Hash
	PCRs   []int
	// Holds refuses to define the index if its PCRs do not hold the running boot.
	Holds func(context.Context) error
}

// do runs f with the terms of the running boot. The PCRs are read in a session that is
// salted to the storage root key, as the index is: on the bus nobody can have kleidi
// expect, and believe, the index of another boot.
func (p *AnchorStore) do(ctx context.Context, f func(transport.TPM, *keys.SRK, authpolicy.Terms) error) error {
	err := p.Device.Do(ctx, func(t transport.TPM) error {
		return keys.WithSRK(t, p.Owner, nil, func(srk *keys.SRK) error {
			values, err := keys.ReadPCRs(t, p.Bank, p.PCRs, srk.Session(tpm2.Audit()))
			if err != nil {
				return err
			}
			return f(t, srk, authpolicy.Terms{authpolicy.PCR{Bank: p.Bank, Values: values}})
		})
	})
	if err != nil && seal.CauseOf(err) == "" {
		return seal.Errorf(seal.CauseUnavailable, "see tpm.device; a running kleidi serve tries again by itself", "the anchor in the TPM: %w", err)
	}
	return err
}

// Load returns the content of the index. A missing index is an error, because someone may
// have removed it.
func (p *AnchorStore) Load(ctx context.Context) (value [AnchorSize]byte, err error) {
	err = p.do(ctx, func(t transport.TPM, srk *keys.SRK, terms authpolicy.Terms) error {
		value, err = p.Anchor.Read(t, srk, terms)
		return err
	})
	return value, err
}

// Save replaces the content of the index. It does not write a value that the index holds
// already, because NV memory wears out.
func (p *AnchorStore) Save(ctx context.Context, value [AnchorSize]byte) error {
	return p.save(ctx, value, func(transport.TPM, *keys.SRK, authpolicy.Terms, error) error { return nil })
}

// Replace is Save that first defines the index if it is missing, or if another index has
// its number.
func (p *AnchorStore) Replace(ctx context.Context, value [AnchorSize]byte) error {
	if err := p.Holds(ctx); err != nil {
		return err
	}
	return p.save(ctx, value, func(t transport.TPM, srk *keys.SRK, terms authpolicy.Terms, err error) error {
		if errors.Is(err, ErrAnchorMissing) || errors.Is(err, ErrAnchorReplaced) {
			return p.Anchor.Replace(t, srk, terms)
		}
		return nil
	})
}

func (p *AnchorStore) save(ctx context.Context, value [AnchorSize]byte, prepare func(transport.TPM, *keys.SRK, authpolicy.Terms, error) error) error {
	return p.do(ctx, func(t transport.TPM, srk *keys.SRK, terms authpolicy.Terms) error {
		now, err := p.Anchor.Read(t, srk, terms)
		if err == nil && now == value {
			return nil
		}
		if err := prepare(t, srk, terms, err); err != nil {
			return err
		}
		return p.Anchor.Write(t, srk, terms, value)
	})
}

// Remove undefines the index that has the anchor's number, in any boot state. A missing
// index is not an error.
func (p *AnchorStore) Remove(ctx context.Context) error {
	return p.do(ctx, func(t transport.TPM, srk *keys.SRK, _ authpolicy.Terms) error { return p.Anchor.Remove(t, srk) })
}
