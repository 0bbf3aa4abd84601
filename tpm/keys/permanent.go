package keys

import (
	"context"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/tpm/device"
)

// OwnerAuthSet reports whether the owner hierarchy has an authorization value, as the TPM
// says without a proof (TPMA_PERMANENT, TPM 2.0 Library, Part 2, 8.6).
func OwnerAuthSet(ctx context.Context, d *device.Device) (set bool, err error) {
	err = d.Do(ctx, func(t transport.TPM) error {
		set, err = ownerAuthSet(t)
		return err
	})
	return set, err
}

func ownerAuthSet(t transport.TPM) (bool, error) {
	r, err := tpm2.GetCapability{Capability: tpm2.TPMCapTPMProperties, Property: uint32(tpm2.TPMPTPermanent), PropertyCount: 1}.Execute(t)
	if err != nil {
		return false, fmt.Errorf("TPM2_GetCapability: %w", err)
	}
	properties, err := r.CapabilityData.Data.TPMProperties()
	if err != nil {
		return false, fmt.Errorf("TPM2_GetCapability: %w", err)
	}
	const ownerBit = 1 << 0
	for _, p := range properties.TPMProperty {
		if p.Property == tpm2.TPMPTPermanent {
			return p.Value&ownerBit != 0, nil
		}
	}
	return false, errors.New("TPM2_GetCapability: the TPM does not tell its permanent attributes")
}
