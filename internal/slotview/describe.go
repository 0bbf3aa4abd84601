package slotview

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/kmsplugin"
	"github.com/beezy-dev/kleidi/hsm"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/both"
	"github.com/beezy-dev/kleidi/seal/recovery"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/vault"
)

// Binding describes in one line what a slot is sealed to.
func (r Reader) Binding(s seal.Slot) string {
	switch s.Type {
	case seal.TypeTPM:
		d, err := tpm.DemandOf(s, r.Counter)
		if err != nil {
			return "unreadable"
		}
		s := fmt.Sprintf("PCR %s (%s), up to epoch %d", JoinPCRs(slices.Sorted(maps.Keys(d.State.Values))), eventlog.BankName(d.State.Bank), d.AtMost)
		if d.State.Use == tpm.UseSuspend {
			s += fmt.Sprintf(", up to reset %d of the TPM", d.State.Resets)
		}
		if d.State.Verifier != nil {
			s += ", with a verifier's signature"
		}
		return s
	case seal.TypeRecovery:
		recipients, err := recovery.Recipients(s)
		if err != nil {
			return "unreadable"
		}
		return "age " + strings.Join(recipients, ", ")
	case seal.TypePKCS11:
		return hsm.Describe(s)
	case seal.TypeVault:
		return vault.Describe(s)
	case seal.TypeKMSPlugin:
		return kmsplugin.Describe(s)
	case seal.TypeTPMAndPKCS11, seal.TypeTPMAndVault, seal.TypeTPMAndKMSPlugin:
		first, second, err := both.Parts(s)
		if err != nil {
			return "unreadable"
		}
		return r.Binding(first) + ", and " + r.Binding(second)
	case seal.TypeSkipped:
		d, _ := MissingOf(s)
		if d.Since.IsZero() {
			return "no slot, although unlock.order names it"
		}
		return "left out by the rotation of " + d.Since.Local().Format(time.DateTime)
	default:
		return ""
	}
}

// Use returns the purpose of a slot; it is "" for slots of wrappers other than the TPM's.
func (r Reader) Use(s seal.Slot) string {
	if d, err := tpm.DemandOf(TPMPart(s), r.Counter); TPMPart(s).Type == seal.TypeTPM && err == nil {
		return UseNames[d.State.Use]
	}
	return ""
}

// Verified reports whether a slot demands that a remote verifier agrees.
func (r Reader) Verified(s seal.Slot) bool {
	d, err := tpm.DemandOf(TPMPart(s), r.Counter)
	return TPMPart(s).Type == seal.TypeTPM && err == nil && d.State.Verifier != nil
}

// OpensIn describes in one line the boots in which a slot of the TPM opens.
func (r Reader) OpensIn(s seal.Slot) string {
	switch r.Use(s) {
	case "next":
		return "the next boot state: " + r.Binding(s)
	case "suspend":
		return "any boot that leaves these as they are: " + r.Binding(s)
	case "signed":
		return "signed boot states, with " + r.Binding(s)
	}
	return "the present boot state: " + r.Binding(s)
}

// UseNames are the names of the purposes of slots, for display.
var UseNames = map[tpm.Use]string{tpm.UsePresent: "present", tpm.UseNext: "next", tpm.UseSuspend: "suspend", tpm.UseSigned: "signed"}

// JoinPCRs lists PCRs for display: "4, 7, 11".
func JoinPCRs(pcrs []int) string {
	return strings.Trim(strings.ReplaceAll(fmt.Sprint(pcrs), " ", ", "), "[]")
}

// SameBinding reports whether two slots have the same wrapper and the same recipients.
func (r Reader) SameBinding(a, b seal.Slot) bool {
	return a.Type == b.Type && (a.Type != seal.TypeRecovery || r.Binding(a) == r.Binding(b))
}

// ReportReturned lists the slots of the backup that are in the restored keyring but were
// not in the replaced one. It returns nothing if the replaced slots are unknown.
func (r Reader) ReportReturned(backup, before, after []seal.Slot) (changes []string) {
	if before == nil {
		return nil
	}
	names := Names(after)
	for i, s := range after {
		alike := func(other seal.Slot) bool { return r.SameBinding(other, s) }
		if s.Type != seal.TypeSkipped && slices.ContainsFunc(backup, alike) && !slices.ContainsFunc(before, alike) {
			changes = append(changes, "slot "+names[i]+" is back, which the replaced keyring did not have: "+r.Binding(s))
		}
	}
	return changes
}

// HasBackend reports whether a token, a server or a plugin opens slots of a type, alone or
// together with the TPM.
func HasBackend(kind string) bool {
	return IsSecondary(kind) || Second(kind) != ""
}
