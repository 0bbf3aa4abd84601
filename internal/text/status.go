package text

import (
	"fmt"
	"io"
	"reflect"
	"slices"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
)

// Status prints the report of kleidi status.
func Status(w io.Writer, r admin.StatusReport) {
	state := string(r.State)
	if !r.Since.IsZero() {
		state += " since " + r.Since.Local().Format(time.DateTime)
	}
	row(w, "state", state)
	problem(w, r.Problem)
	if !r.NextAttempt.IsZero() && r.State == admin.Locked {
		row(w, "next attempt", r.NextAttempt.Local().Format(time.DateTime))
	}
	if r.Suspension != nil {
		row(w, "SUSPENDED", r.Suspension.String())
	}
	if r.Fallback != nil {
		row(w, "FALLBACK", "opened by "+r.Wrapper+", because no wrapper before it in unlock.order opened it:")
		problem(w, r.Fallback)
	}
	row(w, "node", r.Node)
	row(w, "cluster ID", r.ClusterID)
	if r.Revision > 0 {
		row(w, "revision", fmt.Sprint(r.Revision))
	}
	keys(w, r.Keys)
	if r.Staged != nil {
		problem(w, r.Staged)
	}
	cluster(w, r.Cluster)
	attestation(w, r)
	sealedTo(w, r)
	if r.Memory != "" {
		row(w, "memory", r.Memory)
	}
	if r.TPMOpenTo != "" {
		row(w, "TPM OPEN TO", r.TPMOpenTo)
		fmt.Fprintf(w, "%-14s   -> with a copy of the keyring, these users can get the KEK: see docs/threat-model.md\n", "")
	}
	row(w, "version", r.Version)
}

// attestation prints whether the boot passed, unless nothing attests.
func attestation(w io.Writer, r admin.StatusReport) {
	at := r.Attestation
	if at == nil {
		return
	}
	verdict := "passed"
	if !at.Passed {
		verdict = "failed"
	}
	if len(at.PCRs) > 0 {
		verdict += fmt.Sprintf(": %s boot, PCR %s (%s)", at.Boot, slotview.JoinPCRs(at.PCRs), at.Bank)
	}
	row(w, "attestation", verdict)
	furtherProblem(w, r, at.Problem)
}

// sealedTo prints the slots, the former ones that are not revoked, and those that were changed
// from outside.
func sealedTo(w io.Writer, r admin.StatusReport) {
	for _, s := range r.Slots {
		kind := s.Type
		if kind == seal.TypeSkipped {
			kind = s.Name // of the missing slot
		}
		if s.Use != "" && s.Use != slotview.UseNames[tpm.UsePresent] {
			kind += " (" + s.Use + ")"
		}
		row(w, "slot", kind+"  "+s.Binding+"  "+opens(s))
		furtherProblem(w, r, s.Problem)
	}
	for _, u := range r.Unrevoked {
		row(w, "NOT REVOKED", u.Message+", since "+u.Since.Local().Format(time.DateTime))
		fmt.Fprintf(w, "%-14s   -> %s\n", "", u.Hint)
	}
	for _, c := range r.ChangedOutside {
		row(w, "NOT BY KLEIDI", c.Change+": "+c.Slot)
	}
	if len(r.ChangedOutside) > 0 {
		fmt.Fprintf(w, "%-14s   -> %s\n", "", slotview.HintOutside)
	}
}

// furtherProblem prints a problem, unless it is the report's own, which is already printed.
func furtherProblem(w io.Writer, r admin.StatusReport, p *admin.Problem) {
	if r.Problem == nil || !reflect.DeepEqual(p, r.Problem) {
		problem(w, p)
	}
}

// keys prints the retired KEKs in one line: there may be [slotview.MostRetired].
func keys(w io.Writer, keys []admin.KeyReport) {
	var retired []admin.KeyReport
	for _, k := range keys {
		if k.Role == "retired" {
			retired = append(retired, k)
			continue
		}
		row(w, k.Role+" KEK", fmt.Sprintf("%s  made %s", k.KeyID, k.Created.Local().Format(time.DateTime)))
	}
	switch n := len(retired); n {
	case 0:
	case 1:
		row(w, "retired KEK", fmt.Sprintf("%s  made %s", retired[0].KeyID, retired[0].Created.Local().Format(time.DateTime)))
	default:
		oldest := slices.MinFunc(retired, func(a, b admin.KeyReport) int { return a.Created.Compare(b.Created) })
		row(w, "retired KEKs", fmt.Sprintf("%d, the oldest made %s (kleidi keyring show lists them)", n, oldest.Created.Local().Format(time.DateTime)))
		if n >= slotview.ManyRetired {
			row(w, "", fmt.Sprintf("-> %d fit: run kleidi prune KEYID for each one under which nothing is stored", slotview.MostRetired))
		}
	}
}

func opens(s admin.SlotReport) string {
	switch {
	case s.NotTried:
		return "(not tried; kleidi slot test does)"
	case s.Opens == nil:
		return ""
	case *s.Opens:
		return "(opens now)"
	case s.Use == slotview.UseNames[tpm.UseNext] && s.Problem == nil:
		return "(for the next boot)"
	default:
		return "(DOES NOT OPEN)"
	}
}
