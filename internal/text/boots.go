package text

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"text/tabwriter"

	"github.com/beezy-dev/kleidi/internal/inspect"
	"github.com/beezy-dev/kleidi/internal/reseal"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// Verdict prints the judgement of a boot. claimed says that no TPM has quoted the log.
func Verdict(w io.Writer, v *bootpolicy.Verdict, claimed bool) {
	switch {
	case v.Accepted && claimed:
		fmt.Fprintln(w, "accepted, if the log tells the truth: no PCR values were given with --pcrs")
	case v.Accepted:
		fmt.Fprintln(w, "accepted")
	}
	findings(w, v)
}

func findings(w io.Writer, v *bootpolicy.Verdict) {
	for _, f := range v.Findings {
		fmt.Fprintln(w, "-", f)
	}
	if v.More > 0 {
		fmt.Fprintf(w, "- and %d more\n", v.More)
	}
}

// Events prints a table of the events of a log.
func Events(w io.Writer, rows []bootpolicy.Row) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "EVENT\tPCR\tTYPE (CLAIMED)\tDIGEST\tBACKED BY\tWHAT")
	for _, r := range rows {
		pcr := fmt.Sprint(r.PCR)
		if r.PCR == eventlog.NoPCR {
			pcr = "-"
		}
		fmt.Fprintf(t, "%d\t%s\t%s\t%s\t%s\t%s\n", r.Event, pcr, r.UntrustedType, r.Short(), r.Backed, r.What)
	}
	_ = t.Flush()
}

// Evidence prints the judgement of saved evidence.
func Evidence(w io.Writer, v *inspect.EvidenceVerdict) {
	if v.Accepted {
		fmt.Fprintln(w, "accepted, as quoted by attestation key "+v.AttestationKey)
		fmt.Fprintln(w, "the file does not prove in which TPM that key is")
		if !v.Fresh {
			fmt.Fprintln(w, "the file does not prove when it was quoted: no nonce was given with --nonce")
		}
	}
	findings(w, v.Verdict)
}

// BootStates prints a table of signed boot states.
func BootStates(w io.Writer, states []inspect.StateReport) {
	if len(states) == 0 {
		fmt.Fprintln(w, "there are no signed boot states; see docs/updates.md")
		return
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "KEY\tGENERATION\tPCRS\tHAS A SLOT\tFILE\tWHAT")
	for _, s := range states {
		g, slot := fmt.Sprint(s.Generation), "yes"
		if s.Generation == 0 {
			g = "-"
		}
		if !s.Counts {
			slot = "no"
		}
		fmt.Fprintf(t, "%.16s\t%s\t%s (%s)\t%s\t%s\t%s\n", s.Key, g, slotview.JoinPCRs(s.PCRs), s.Bank, slot, s.File, s.What)
	}
	_ = t.Flush()
}

// Next prints the boot state of the next boot.
func Next(w io.Writer, r *reseal.NextResult) {
	fmt.Fprintf(w, "next boot       %s, %s\n", r.BootType, r.Bank)
	for _, i := range slices.Sorted(maps.Keys(r.PCRs)) {
		note := ""
		if slices.Contains(r.Moved, i) {
			note = "  changes"
		}
		fmt.Fprintf(w, "  PCR %-2d        %s%s\n", i, r.PCRs[i], note)
	}
	if r.Keyring != nil {
		State(w, *r.Keyring)
	}
}

// PolicyChanges prints how the demands of one boot policy differ from another's.
func PolicyChanges(w io.Writer, changes []bootpolicy.Change) {
	for _, c := range changes {
		fmt.Fprintln(w, c)
	}
	if len(changes) == 0 {
		fmt.Fprintln(w, "both policies demand the same")
	}
}

// Narrowed prints the boots that the boot policy no longer allows.
func Narrowed(w io.Writer, r *reseal.Narrowed) {
	switch {
	case len(r.Changes) == 0:
		fmt.Fprintf(w, "%s allows no superseded boot\n", r.File)
	case !r.DryRun:
		fmt.Fprintf(w, "%s no longer allows these:\n", r.File)
	}
	for _, c := range r.Changes {
		fmt.Fprintln(w, c)
	}
}
