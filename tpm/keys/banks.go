package keys

import (
	"crypto"
	"fmt"
	"slices"
	"strings"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
)

// ActiveBanks returns the banks in which the TPM has PCRs.
func ActiveBanks(t transport.TPM) ([]tpm2.TPMAlgID, error) {
	active, err := allocated(t)
	var banks []tpm2.TPMAlgID
	for _, s := range active {
		banks = append(banks, s.Hash)
	}
	return banks, err
}

// allocated returns the PCRs of each bank that has PCRs.
func allocated(t transport.TPM) ([]tpm2.TPMSPCRSelection, error) {
	r, err := tpm2.GetCapability{Capability: tpm2.TPMCapPCRs, PropertyCount: 1}.Execute(t)
	if err != nil {
		return nil, fmt.Errorf("TPM2_GetCapability: %w", err)
	}
	assigned, err := r.CapabilityData.Data.AssignedPCR()
	if err != nil {
		return nil, fmt.Errorf("TPM2_GetCapability: %w", err)
	}
	return slices.DeleteFunc(assigned.PCRSelections, func(s tpm2.TPMSPCRSelection) bool {
		return !slices.ContainsFunc(s.PCRSelect, func(b byte) bool { return b != 0 })
	}), nil
}

// algorithmNames are the names of banks as tpm2-tools write them.
var algorithmNames = map[tpm2.TPMAlgID]string{
	tpm2.TPMAlgSHA1: "sha1", tpm2.TPMAlgSHA256: "sha256", tpm2.TPMAlgSHA384: "sha384", tpm2.TPMAlgSHA512: "sha512",
	0x12: "sm3_256", tpm2.TPMAlgSHA3256: "sha3_256", tpm2.TPMAlgSHA3384: "sha3_384", tpm2.TPMAlgSHA3512: "sha3_512",
}

// MissingPCRs says why TPM2_PCR_Read returned fewer values than were asked for.
func MissingPCRs(t transport.TPM, bank crypto.Hash, pcrs []int) error {
	active, err := allocated(t)
	if err != nil {
		return err
	}
	var names []string
	var usable []crypto.Hash
	for _, s := range active {
		if s.Hash == authpolicy.Banks[bank] {
			return missingIn(s, bank, pcrs)
		}
		names = append(names, algorithmName(s.Hash))
		for hash, id := range authpolicy.Banks {
			if id == s.Hash {
				usable = append(usable, hash)
			}
		}
	}
	has := strings.Join(names, ", ")
	if len(names) == 1 {
		has += " alone"
	}
	return notConfigured(BankHint(bank, usable), "the TPM has no %s bank; it has %s", BankName(bank), has)
}

// missingIn is MissingPCRs for a bank that the TPM has.
func missingIn(s tpm2.TPMSPCRSelection, bank crypto.Hash, pcrs []int) error {
	missing := slices.DeleteFunc(slices.Clone(pcrs), func(i int) bool {
		return i/8 < len(s.PCRSelect) && s.PCRSelect[i/8]>>(i%8)&1 == 1
	})
	if len(missing) == 0 {
		return fmt.Errorf("TPM2_PCR_Read: values of PCR %v are missing, which the TPM has", pcrs)
	}
	return notConfigured("see tpm.pcrs, and the PCR banks in the firmware's settings", "the TPM's %s bank has no PCR %v", BankName(bank), missing)
}

func notConfigured(hint, format string, args ...any) error {
	return &seal.Error{Cause: seal.CauseConfiguration, Permanent: true, Hint: hint, Err: fmt.Errorf(format, args...)}
}

func algorithmName(id tpm2.TPMAlgID) string {
	if name, ok := algorithmNames[id]; ok {
		return name
	}
	return fmt.Sprintf("algorithm %#x", uint16(id))
}

// BankHint says what to do if a TPM or an event log lacks bank and has only the banks
// in has.
func BankHint(bank crypto.Hash, has []crypto.Hash) string {
	for _, other := range []crypto.Hash{crypto.SHA256, crypto.SHA384} {
		if slices.Contains(has, other) {
			return "set tpm.bank: " + BankName(other) + "; to open what was sealed under " + BankName(bank) + ", switch that bank on again in the firmware's settings"
		}
	}
	return "switch on SHA-256 in the firmware's settings of the TPM"
}

var bankNames = map[string]crypto.Hash{"sha256": crypto.SHA256, "sha384": crypto.SHA384}

// ParseBank reads the setting tpm.bank: sha256 or sha384.
func ParseBank(s string) (crypto.Hash, error) {
	if h, ok := bankNames[s]; ok {
		return h, nil
	}
	return 0, fmt.Errorf("PCR bank %q; want sha256 or sha384", s)
}

// BankName returns the name of a bank, as tpm.bank names it.
func BankName(h crypto.Hash) string {
	for name, hash := range bankNames {
		if hash == h {
			return name
		}
	}
	return h.String()
}
