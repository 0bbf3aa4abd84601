package tpm

import (
	"errors"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/device"
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

// classify gives an error of the TPM its cause: first those of a slot's authorization
// policy, then those that any command can have.
func classify(err error) error {
	var state *StateError
	switch {
	case err == nil, seal.CauseOf(err) != "":
		return err
	case errors.Is(err, authpolicy.ErrNoSignedState), errors.Is(err, authpolicy.ErrSignature), errors.Is(err, authpolicy.ErrKey):
		return seal.Errorf(seal.CauseBootState, "boot one that is signed, sign it with kleidi bootstate sign --key FILE --cluster-id ID --event-log FILE and add it with kleidi bootstate add FILE --public-key FILE",
			"the way in which the machine booted is not among the signed boot states: %w", err).OrRecover()
	case errors.Is(err, authpolicy.ErrResets):
		return seal.Errorf(seal.CauseBootState, "boot what was booted before it", "the suspension is over, or the machine was restarted without a reset of its TPM: %w", err).OrRecover()
	case errors.As(err, &state):
		return seal.Errorf(seal.CauseBootState, "boot the earlier kernel and settings", "the machine did not boot as it did when the slot was sealed: %w", err).OrRecover()
	case errors.Is(err, authpolicy.ErrEpoch):
		return seal.Errorf(seal.CauseEpoch, "use the present keyring, not an older copy", "the slot was revoked by a later reseal: %w", err).OrRecover()
	case errors.Is(err, authpolicy.ErrCounter):
		return seal.Errorf(seal.CauseEpoch, "find out who removed or replaced kleidi's epoch counter", "%w", err).OrRecover()
	}
	return device.Classify(err)
}
