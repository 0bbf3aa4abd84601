package nv

import (
	"context"
	"crypto"
	"errors"

	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
)

// AnchorStore is the anchor of the running boot: what it demands of the index are the
// values that some PCRs have now. So nobody can write it who boots with others.
type AnchorStore struct {
	Anchor *Anchor
	Device *tpm.Device
	Owner  tpm.Owner
	Bank   crypto.Hash
	PCRs   []int
	// Holds refuses to make the index for a boot that its PCRs do not hold.
	Holds func(context.Context) error
}

// do runs f with what the running boot demands of the index.
func (p *AnchorStore) do(ctx context.Context, f func(transport.TPM, *tpm.SRK, authpolicy.Terms) error) error {
	err := p.Device.Do(ctx, func(t transport.TPM) error {
		values, err := tpm.ReadPCRs(t, p.Bank, p.PCRs)
		if err != nil {
			return err
		}
		return tpm.WithSRK(t, p.Owner, nil, func(srk *tpm.SRK) error {
			return f(t, srk, authpolicy.Terms{authpolicy.PCR{Bank: p.Bank, Values: values}})
		})
	})
	if err != nil && seal.CauseOf(err) == "" {
		return seal.Errorf(seal.CauseUnavailable, "see tpm.device; kleidi serve tries again", "the anchor in the TPM: %w", err)
	}
	return err
}

// Load returns what the index holds. That there is none is an error: someone may
// have removed it.
func (p *AnchorStore) Load(ctx context.Context) (value [AnchorSize]byte, err error) {
	err = p.do(ctx, func(t transport.TPM, srk *tpm.SRK, terms authpolicy.Terms) error {
		value, err = p.Anchor.Read(t, srk, terms)
		return err
	})
	return value, err
}

// Save replaces what the index holds. What is there already is not written again:
// NV memory wears out.
func (p *AnchorStore) Save(ctx context.Context, value [AnchorSize]byte) error {
	return p.save(ctx, value, func(transport.TPM, *tpm.SRK, authpolicy.Terms, error) error { return nil })
}

// Replace does so, and makes the index anew where there is none or another one
// stands in its place.
func (p *AnchorStore) Replace(ctx context.Context, value [AnchorSize]byte) error {
	if err := p.Holds(ctx); err != nil {
		return err
	}
	return p.save(ctx, value, func(t transport.TPM, srk *tpm.SRK, terms authpolicy.Terms, err error) error {
		if errors.Is(err, ErrAnchorMissing) || errors.Is(err, ErrAnchorReplaced) {
			return p.Anchor.Replace(t, srk, terms)
		}
		return nil
	})
}

func (p *AnchorStore) save(ctx context.Context, value [AnchorSize]byte, prepare func(transport.TPM, *tpm.SRK, authpolicy.Terms, error) error) error {
	return p.do(ctx, func(t transport.TPM, srk *tpm.SRK, terms authpolicy.Terms) error {
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
