package keys

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/device"
)

// Quote is a TPM's signed statement of PCR values, with the key that signed it. A
// recipient must trust nothing in it before verifying the signature.
type Quote struct {
	AKPublic  []byte         // TPMT_PUBLIC of the attestation key
	Attest    []byte         // TPMS_ATTEST
	Signature []byte         // TPMT_SIGNATURE
	Bank      crypto.Hash    // of PCRs
	PCRs      map[int][]byte // by index
}

// quoteTries bounds how often a quote is repeated because a PCR was extended
// between reading the values and quoting them.
const quoteTries = 5

// Quoter quotes PCRs with an attestation key that it may keep.
type Quoter struct {
	Device *device.Device
	Owner  Owner
	// AK keeps the attestation key. If nil, each quote uses a fresh one.
	AK AKStore
}

// Quote quotes the PCRs; nonce, of at most 64 bytes, becomes the quote's extraData. srk
// is the Name of a storage root key to prefer if the TPM has it at hand, or nil.
func (q Quoter) Quote(ctx context.Context, srk, nonce []byte, bank crypto.Hash, pcrs []int) (quote *Quote, err error) {
	err = q.Device.Do(ctx, func(t transport.TPM) error {
		return withAnySRK(t, q.Owner, srk, func(srk *SRK) error {
			return withKeptAK(t, srk, q.AK, func(ak *AK) (err error) {
				quote, err = ak.Quote(t, nonce, bank, pcrs)
				return err
			})
		})
	})
	if err != nil {
		return nil, device.Classify(err)
	}
	return quote, nil
}

// Quote quotes the PCRs; nonce, of at most 64 bytes, becomes the quote's extraData.
func (ak *AK) Quote(t transport.TPM, nonce []byte, bank crypto.Hash, pcrs []int) (*Quote, error) {
	pcrs = slices.Clone(pcrs)
	slices.Sort(pcrs)
	for range quoteTries {
		values, err := ReadPCRs(t, bank, pcrs)
		if err != nil {
			return nil, err
		}
		r, err := tpm2.Quote{
			SignHandle:     ak.auth(),
			QualifyingData: tpm2.TPM2BData{Buffer: nonce},
			InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
			PCRSelect:      authpolicy.Selection(bank, pcrs),
		}.Execute(t)
		if err != nil {
			return nil, fmt.Errorf("TPM2_Quote: %w", err)
		}
		if states(r.Quoted, pcrs, values) {
			return &Quote{AKPublic: ak.Public, Attest: r.Quoted.Bytes(), Signature: tpm2.Marshal(r.Signature), Bank: bank, PCRs: values}, nil
		}
	}
	return nil, errors.New("TPM2_Quote: PCRs change faster than they can be quoted")
}

// states reports whether the quote covers these values. It verifies nothing: it only
// detects a PCR that was extended in between.
func states(quoted tpm2.TPM2BAttest, pcrs []int, values map[int][]byte) bool {
	a, err := quoted.Contents()
	if err != nil {
		return false
	}
	info, err := a.Attested.Quote()
	if err != nil {
		return false
	}
	h := crypto.SHA256.New() // the attestation key's scheme
	for _, i := range pcrs {
		h.Write(values[i])
	}
	return bytes.Equal(info.PCRDigest.Buffer, h.Sum(nil))
}

// ReadPCRs returns PCR values. Without a session nothing authenticates them; a session
// for audit that is salted to the SRK does. A PCR that the TPM does not have in that bank
// is an error.
func ReadPCRs(t transport.TPM, bank crypto.Hash, pcrs []int, session ...tpm2.Session) (map[int][]byte, error) {
	values := make(map[int][]byte, len(pcrs))
	for rest := slices.Sorted(slices.Values(pcrs)); len(rest) > 0; {
		n := min(len(rest), 8) // TPML_DIGEST holds 8
		r, err := tpm2.PCRRead{PCRSelectionIn: authpolicy.Selection(bank, rest[:n])}.Execute(t, session...)
		if err != nil {
			return nil, fmt.Errorf("TPM2_PCR_Read: %w", err)
		}
		if len(r.PCRValues.Digests) != n {
			return nil, MissingPCRs(t, bank, rest[:n])
		}
		for k, i := range rest[:n] {
			values[i] = r.PCRValues.Digests[k].Buffer
		}
		rest = rest[n:]
	}
	return values, nil
}

// ResetCount returns how often the TPM was reset, once per boot. A session
// authenticates the answer, because the limit of a suspension depends on it.
func ResetCount(ctx context.Context, d *device.Device, owner Owner) (count uint32, err error) {
	err = d.Do(ctx, func(t transport.TPM) error {
		return WithSRK(t, owner, nil, func(srk *SRK) error {
			count, err = authpolicy.ResetCount(t, srk.Session(tpm2.Audit()))
			return err
		})
	})
	return count, device.Classify(err)
}
