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
)

// StateError says that the machine is not in the boot state that a slot demands.
type StateError struct {
	Was BootState // the boot state that the slot demands
	err error
}

// Error implements error.
func (e *StateError) Error() string { return e.err.Error() }

// Unwrap returns what the TPM answered.
func (e *StateError) Unwrap() error { return e.err }

// unsealTries bounds how often an unseal is repeated because a PCR, for instance IMA's,
// was extended in the meantime.
const unsealTries = 8

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
		return w.withSRK(t, d, func(srk *SRK) (err error) {
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

// damaged are the response codes by which TPM2_Load and TPM2_Import blame the object
// (TPM 2.0 Library, Part 3, 12.2). All other codes mean trouble of the TPM itself.
var damaged = []tpm2.TPMRC{
	tpm2.TPMRCIntegrity, tpm2.TPMRCSize, tpm2.TPMRCValue, tpm2.TPMRCAttributes, tpm2.TPMRCHash, tpm2.TPMRCType, tpm2.TPMRCKeySize,
	tpm2.TPMRCScheme, tpm2.TPMRCSymmetric, tpm2.TPMRCBinding, tpm2.TPMRCInsufficient, tpm2.TPMRCSelector, tpm2.TPMRCKDF, tpm2.TPMRCSensitive,
}

func isDamage(err error) bool {
	return slices.ContainsFunc(damaged, func(rc tpm2.TPMRC) bool { return errors.Is(err, rc) })
}

func (w *Wrapper) unseal(ctx context.Context, t transport.TPM, srk *SRK, d *slotData) (*seal.Secret, error) {
	var err error
	for range unsealTries {
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
func (w *Wrapper) unsealOnce(ctx context.Context, t transport.TPM, srk *SRK, d *slotData) (kek *seal.Secret, err error) {
	session, done, err := tpm2.PolicySession(t, tpm2.TPMAlgSHA256, nonceSize, srk.salted(), tpm2.AESEncryption(128, tpm2.EncryptOut))
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
	object, err := load(t, srk, tpm2.New2B(*d.public), private, corrupt)
	if err != nil {
		return nil, err
	}
	defer flush(t, object.Handle)
	kek, err = unseal(t, object, session, w.Memory, func(n int) error {
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

// unseal moves the content of a sealed object into locked memory, if its size fits. The
// garbage collection erases the copies that go-tpm leaves behind.
func unseal(t transport.TPM, object tpm2.NamedHandle, session tpm2.Session, mem seal.Memory, fits func(n int) error) (secret *seal.Secret, err error) {
	seal.Erase(func() {
		var r *tpm2.UnsealResponse
		r, err = tpm2.Unseal{ItemHandle: tpm2.AuthHandle{Handle: object.Handle, Name: object.Name, Auth: session}}.Execute(t)
		if err != nil {
			err = fmt.Errorf("TPM2_Unseal: %w", err)
			return
		}
		if err = fits(len(r.OutData.Buffer)); err != nil {
			clear(r.OutData.Buffer)
			return
		}
		secret, err = mem.Take(r.OutData.Buffer)
	})
	return secret, err
}

// terms returns the terms of the slot, with the boot states that are signed for it and
// with the way to its verifier.
func (w *Wrapper) terms(ctx context.Context, t transport.TPM, srk *SRK, d *slotData) authpolicy.Terms {
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

// load loads an object. If the TPM blames the object, broken makes the error.
func load(t transport.TPM, srk *SRK, public tpm2.TPM2BPublic, private []byte, broken func(format string, args ...any) error) (object tpm2.NamedHandle, err error) {
	r, err := tpm2.Load{ParentHandle: srk.auth(srk.Session()), InPrivate: tpm2.TPM2BPrivate{Buffer: private}, InPublic: public}.Execute(t)
	if err != nil {
		if isDamage(err) {
			return object, broken("TPM2_Load: %w", err)
		}
		return object, fmt.Errorf("TPM2_Load: %w", err)
	}
	return tpm2.NamedHandle{Handle: r.ObjectHandle, Name: r.Name}, nil
}

// ResetCount returns how often the TPM was reset, once per boot. A session
// authenticates the answer, because the limit of a suspension depends on it.
func (d *Device) ResetCount(ctx context.Context, owner Owner) (count uint32, err error) {
	err = d.Do(ctx, func(t transport.TPM) error {
		return WithSRK(t, owner, nil, func(srk *SRK) error {
			count, err = authpolicy.ResetCount(t, srk.Session(tpm2.Audit()))
			return err
		})
	})
	return count, classify(err)
}
