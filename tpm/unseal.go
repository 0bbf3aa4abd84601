package tpm

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

// Unwrap implements [seal.Wrapper]. If the machine booted in another way, the error is
// [seal.CauseBootState] with a [*StateError].
func (w *Wrapper) Unwrap(ctx context.Context, slot seal.Slot) (*seal.Secret, error) {
	if slot.Type != seal.TypeTPM || slot.Node != w.Node {
		return nil, seal.ErrNotMine
	}
	d, err := parseSlot(slot, w.Counter)
	if err != nil {
		return nil, err
	}
	defer seal.Collect() // the TPM's answer, as go-tpm unmarshalled it
	var kek *seal.Secret
	err = w.Device.Do(ctx, func(t transport.TPM) error {
		return w.withSRK(t, d, func(srk *keys.SRK) (err error) {
			kek, err = w.unseal(ctx, t, srk, d)
			return err
		})
	})
	if d.state.Verifier != nil && errors.Is(err, authpolicy.ErrSignature) && seal.CauseOf(err) == "" {
		return nil, seal.Errorf(seal.CauseCredentials, "see tpm.verifier in the configuration",
			"the slot demands that a verifier agrees: %w", err).OrRecover()
	}
	if errors.Is(err, authpolicy.ErrBootState) || errors.Is(err, authpolicy.ErrNoSignedState) {
		err = &StateError{Was: *d.state, err: err}
	}
	if err != nil {
		return nil, classify(err)
	}
	return kek, nil
}

func (w *Wrapper) unseal(ctx context.Context, t transport.TPM, srk *keys.SRK, d *slotData) (*seal.Secret, error) {
	var err error
	for range keys.UnsealTries {
		var kek *seal.Secret
		kek, err = w.unsealOnce(ctx, t, srk, d)
		if !errors.Is(err, tpm2.TPMRCPCRChanged) {
			return kek, err
		}
	}
	return nil, err
}

// unsealOnce loads the object last. Until then the few object slots of a TPM are free
// for the keys that its authorization policy needs.
func (w *Wrapper) unsealOnce(ctx context.Context, t transport.TPM, srk *keys.SRK, d *slotData) (kek *seal.Secret, err error) {
	session, done, err := tpm2.PolicySession(t, tpm2.TPMAlgSHA256, keys.NonceSize, srk.Salted(), tpm2.AESEncryption(128, tpm2.EncryptOut))
	if err != nil {
		return nil, fmt.Errorf("TPM2_StartAuthSession: %w", err)
	}
	defer func() { _ = done() }() // a session that the TPM has already ended can't be ended again
	if err := w.terms(ctx, t, srk, d).Satisfy(t, session); err != nil {
		return nil, err
	}
	private, err := d.imported(t, srk)
	if err != nil {
		return nil, err
	}
	object, err := keys.Load(t, srk, tpm2.New2B(*d.public), private, corrupt)
	if err != nil {
		return nil, err
	}
	defer keys.Flush(t, object.Handle)
	kek, err = keys.Unseal(t, object, session, w.Memory, func(n int) error {
		if n != seal.KEKSize {
			return corrupt("it holds %d bytes, want %d", n, seal.KEKSize)
		}
		return nil
	})
	if errors.Is(err, tpm2.TPMRCPolicyFail) {
		// The PCRs were right, and parseSlot computed the digest. The only remaining
		// cause is an NV index with another Name and a value that passed.
		err = fmt.Errorf("%w: %w", authpolicy.ErrCounter, err)
	}
	return kek, err
}

// terms returns the terms of the slot, with the boot states that are signed for it and
// with the way to its verifier.
func (w *Wrapper) terms(ctx context.Context, t transport.TPM, srk *keys.SRK, d *slotData) authpolicy.Terms {
	ts := slices.Clone(d.terms)
	for i := range ts {
		switch term := ts[i].(type) {
		case authpolicy.Authorized:
			if w.Signed != nil {
				term.States = w.Signed(*d.state.Signer)
			}
			ts[i] = term
		case authpolicy.Signed:
			if w.Ask != nil {
				term.Sign = func(nonce []byte) (tpm2.TPMTSignature, error) { return w.Ask(ctx, t, srk, *d.state.Verifier, nonce) }
			}
			ts[i] = term
		}
	}
	return ts
}
