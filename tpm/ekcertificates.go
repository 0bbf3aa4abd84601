package tpm

import (
	"context"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
)

// p384Certificate is where the certificate of a P-384 endorsement key stands (TCG
// EK Credential Profile, 2.2.1.5.2: the high range).
const p384Certificate = tpm2.TPMHandle(0x01c00016)

// certificateIndices are looked at in this order.
var certificateIndices = []struct {
	key   string
	index tpm2.TPMHandle
}{
	{"RSA-2048", rsaCertificate},
	{"P-256", eccCertificate},
	{"P-384", p384Certificate},
}

// StoredCertificate is a certificate of an endorsement key as NV memory holds it.
type StoredCertificate struct {
	// Key is the kind of key that belongs there: RSA-2048, P-256 or P-384.
	Key string
	// Index is the NV index.
	Index uint32
	// UntrustedDER is the certificate, perhaps padded, at most 8 KiB: package
	// ekcert verifies it.
	UntrustedDER []byte
}

// EKCertificates returns the certificates that the TPM's maker left in it, those
// of RSA-2048, P-256 and P-384 endorsement keys, in that order. That there is none
// is no error: many TPMs have theirs on the maker's servers only. Those that could
// be read are returned even with an error, which names the first that could not.
func (d *Device) EKCertificates(ctx context.Context, owner Owner) (found []StoredCertificate, err error) {
	err = d.Do(ctx, func(t transport.TPM) error {
		var unread error
		for _, c := range certificateIndices {
			der, err := readCertificate(t, owner, c.index)
			switch {
			case err != nil && unread == nil:
				unread = fmt.Errorf("%s endorsement key certificate in NV index %#08x: %w", c.key, uint32(c.index), err)
			case len(der) > 0:
				found = append(found, StoredCertificate{Key: c.key, Index: uint32(c.index), UntrustedDER: der})
			}
		}
		return unread
	})
	return found, classify(err)
}

// readCertificate returns nil where there is no such index, or nothing was ever
// written to it.
func readCertificate(t transport.TPM, owner Owner, handle tpm2.TPMHandle) ([]byte, error) {
	r, err := tpm2.NVReadPublic{NVIndex: handle}.Execute(t)
	if errors.Is(err, tpm2.TPMRCHandle) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("TPM2_NV_ReadPublic: %w", err)
	}
	public, err := r.NVPublic.Contents()
	if err != nil {
		return nil, fmt.Errorf("TPM2_NV_ReadPublic: %w", err)
	}
	index := tpm2.NamedHandle{Handle: handle, Name: r.NVName}
	switch a := public.Attributes; {
	case !a.Written:
		return nil, nil
	case a.NT != tpm2.TPMNTOrdinary || public.DataSize > maxCertificate:
		return nil, seal.Errorf(seal.CauseUnavailable, "see what uses that index: tpm2_nvreadpublic",
			"it holds no certificate: %d bytes of type %d, want at most %d of type 0", public.DataSize, a.NT, maxCertificate)
	case a.AuthRead:
		return readNV(t, tpm2.AuthHandle{Handle: handle, Name: r.NVName, Auth: tpm2.PasswordAuth(nil)}, index, public.DataSize)
	case a.OwnerRead:
		return readAsOwner(t, owner, index, public.DataSize)
	}
	return nil, seal.Errorf(seal.CauseCredentials, "get the certificate from the TPM's maker instead", "neither its own nor the owner's authorization may read it")
}

func readAsOwner(t transport.TPM, owner Owner, index tpm2.NamedHandle, size uint16) (b []byte, err error) {
	err = WithSRK(t, owner, nil, func(srk *SRK) error {
		auth, err := owner.OwnerHandle(srk)
		if err != nil {
			return err
		}
		b, err = readNV(t, auth, index, size)
		return err
	})
	return b, err
}

// readNV reads an index in blocks that every TPM has room for.
func readNV(t transport.TPM, auth tpm2.AuthHandle, index tpm2.NamedHandle, size uint16) ([]byte, error) {
	b := make([]byte, 0, size)
	for len(b) < int(size) {
		n := min(nvBlock, size-uint16(len(b)))
		r, err := tpm2.NVRead{AuthHandle: auth, NVIndex: index, Size: n, Offset: uint16(len(b))}.Execute(t)
		if err != nil {
			return nil, fmt.Errorf("TPM2_NV_Read: %w", err)
		}
		if len(r.Data.Buffer) != int(n) {
			return nil, fmt.Errorf("TPM2_NV_Read: %d bytes, want %d", len(r.Data.Buffer), n)
		}
		b = append(b, r.Data.Buffer...)
	}
	return b, nil
}
