package keys

import (
	"context"
	"crypto"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/tpm/device"
)

// OwnerAuthSet reports whether the owner hierarchy has an authorization value, as the TPM
// says without a proof (TPMA_PERMANENT, TPM 2.0 Library, Part 2, 8.6).
func OwnerAuthSet(ctx context.Context, d *device.Device) (set bool, err error) {
	p, err := ReadPermanent(ctx, d)
	return p.OwnerAuthSet, err
}

// Permanent is what a TPM says, without a proof, of its owner and of its protection from
// dictionary attacks.
type Permanent struct {
	OwnerAuthSet, InLockout bool
	// Failed is the number of wrong authorizations that the TPM has counted. At Most it
	// locks itself out.
	Failed, Most uint32
}

// Bits of TPMA_PERMANENT.
const (
	ownerAuthSet = 1 << 0
	inLockout    = 1 << 9
)

// ReadPermanent asks for these properties. It uses no authorization.
func ReadPermanent(ctx context.Context, d *device.Device) (p Permanent, err error) {
	err = d.Do(ctx, func(t transport.TPM) error {
		bits, err := property(t, tpm2.TPMPTPermanent)
		if err != nil {
			return err
		}
		p.OwnerAuthSet, p.InLockout = bits&ownerAuthSet != 0, bits&inLockout != 0
		if p.Failed, err = property(t, tpm2.TPMPTLockoutCounter); err != nil {
			return err
		}
		p.Most, err = property(t, tpm2.TPMPTMaxAuthFail)
		return err
	})
	return p, err
}

func property(t transport.TPM, which tpm2.TPMPT) (uint32, error) {
	r, err := tpm2.GetCapability{Capability: tpm2.TPMCapTPMProperties, Property: uint32(which), PropertyCount: 1}.Execute(t)
	if err != nil {
		return 0, fmt.Errorf("TPM2_GetCapability: %w", err)
	}
	properties, err := r.CapabilityData.Data.TPMProperties()
	if err != nil {
		return 0, fmt.Errorf("TPM2_GetCapability: %w", err)
	}
	for _, p := range properties.TPMProperty {
		if p.Property == which {
			return p.Value, nil
		}
	}
	return 0, fmt.Errorf("TPM2_GetCapability: the TPM does not tell property %#x", uint32(which))
}

// PCRs returns PCR values, which nothing authenticates.
func PCRs(ctx context.Context, d *device.Device, bank crypto.Hash, pcrs []int) (values map[int][]byte, err error) {
	err = d.Do(ctx, func(t transport.TPM) error {
		values, err = ReadPCRs(t, bank, pcrs)
		return err
	})
	return values, err
}
