package main

import (
	"fmt"
	"io"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/operation"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
)

func newStatus(a *app) *cobra.Command {
	var quick bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the slots, what they are sealed to, and whether the TPM would open them now",
		Long: `Show the slots, what they are sealed to, which KEK is current, and whether the TPM
would open it now, or why not. The command asks the running kleidi serve. Without one
it checks itself, but tries no slot of pkcs11 or vault; kleidi slot test does.

The exit code is 0 if the KEK is open and nothing is wrong, 3 if kleidi is locked, 4 if
the KEK is open and something needs an operator, and 1 if kleidi could not be asked.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			req := admin.StatusRequest{Try: admin.TryAll}
			if quick {
				req.Try = admin.TryNone
			}
			r, err := operate(cmd.Context(), a, operation.Status, req)
			if err != nil {
				return files.HintRoot(err)
			}
			if err := a.show(cmd.OutOrStdout(), r, func(w io.Writer) { printStatus(w, r) }); err != nil {
				return err
			}
			return verdict(r)
		},
	}
	cmd.Flags().BoolVar(&quick, "quick", false, "do not try the slots in the TPM")
	return cmd
}

// Exit codes of status. 2 belongs to the shell and to flag parsers.
const (
	exitLocked  = 3
	exitProblem = 4
)

// verdict returns the exit code for a status.
func verdict(r admin.StatusReport) error {
	problem := r.Problem != nil || r.Fallback != nil || r.Staged != nil || len(r.Unrevoked) > 0 || len(r.ChangedOutside) > 0 || r.Cluster != nil && r.Cluster.Problem != nil || r.Attestation != nil && r.Attestation.Problem != nil ||
		slices.ContainsFunc(r.Slots, func(s admin.SlotReport) bool { return s.Problem != nil })
	switch {
	case r.State != admin.Open:
		return &exitError{code: exitLocked}
	case problem:
		return &exitError{code: exitProblem}
	}
	return nil
}

func printStatus(w io.Writer, r admin.StatusReport) {
	state := string(r.State)
	if !r.Since.IsZero() {
		state += " since " + r.Since.Local().Format(time.DateTime)
	}
	row(w, "state", state)
	printProblem(w, r.Problem)
	if !r.NextAttempt.IsZero() && r.State == admin.Locked {
		row(w, "next attempt", r.NextAttempt.Local().Format(time.DateTime))
	}
	if r.Suspension != nil {
		row(w, "SUSPENDED", r.Suspension.String())
	}
	if r.Fallback != nil {
		row(w, "FALLBACK", "opened by "+r.Wrapper+", since what comes before it in unlock.order did not:")
		printProblem(w, r.Fallback)
	}
	row(w, "node", r.Node)
	row(w, "cluster ID", r.ClusterID)
	if r.Revision > 0 {
		row(w, "revision", fmt.Sprint(r.Revision))
	}
	printKeys(w, r.Keys)
	if r.Staged != nil {
		printProblem(w, r.Staged)
	}
	printCluster(w, r.Cluster)
	if at := r.Attestation; at != nil {
		verdict := "passed"
		if !at.Passed {
			verdict = "failed"
		}
		if len(at.PCRs) > 0 {
			verdict += fmt.Sprintf(": %s boot, PCR %s (%s)", at.Boot, slotview.JoinPCRs(at.PCRs), at.Bank)
		}
		row(w, "attestation", verdict)
		if r.Problem == nil || !reflect.DeepEqual(at.Problem, r.Problem) { // otherwise it is already printed above
			printProblem(w, at.Problem)
		}
	}
	for _, s := range r.Slots {
		kind := s.Type
		if kind == seal.TypeSkipped {
			kind = s.Name // of the missing slot
		}
		if s.Use != "" && s.Use != slotview.UseNames[tpm.UsePresent] {
			kind += " (" + s.Use + ")"
		}
		row(w, "slot", kind+"  "+s.Binding+"  "+opens(s))
		if s.Problem != nil && (r.Problem == nil || !reflect.DeepEqual(s.Problem, r.Problem)) { // otherwise it is already printed above
			printProblem(w, s.Problem)
		}
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
	if r.Memory != "" {
		row(w, "memory", r.Memory)
	}
	if r.TPMOpenTo != "" {
		row(w, "TPM OPEN TO", r.TPMOpenTo)
		fmt.Fprintf(w, "%-14s   -> with a copy of the keyring they get the KEK: see docs/threat-model.md\n", "")
	}
	row(w, "version", r.Version)
}

// printKeys prints the retired KEKs in one line: there may be 255.
func printKeys(w io.Writer, keys []admin.KeyReport) {
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

func row(w io.Writer, name, value string) {
	if value != "" {
		fmt.Fprintf(w, "%-14s %s\n", name, strings.TrimRight(value, " "))
	}
}

// printProblem prints each detail of a refusal on a separate line.
func printProblem(w io.Writer, p *admin.Problem) {
	if p == nil {
		return
	}
	message := p.Message
	if len(p.Details) > 0 {
		message += ":"
	}
	for _, line := range append([]string{message}, p.Details...) {
		fmt.Fprintf(w, "%-14s   %s\n", "", line)
	}
	if p.Hint != "" {
		fmt.Fprintf(w, "%-14s   -> %s\n", "", p.Hint)
	}
}
