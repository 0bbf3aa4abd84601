package main

import (
	"slices"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/operation"
	"github.com/beezy-dev/kleidi/internal/text"
)

// newStatus returns the verb status. It prints the report first and derives the exit code
// from it last, so that a monitor gets both.
func newStatus(a *app) *cobra.Command {
	var quick bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the slots, what they are sealed to, and whether the TPM would open them now",
		Long: `Show the slots, what they are sealed to, which KEK is current, and whether the TPM
would open it now, or why not. The command asks the running kleidi serve. Without one
it checks itself, but tries no slot of pkcs11, vault or kms-plugin; kleidi slot test does.

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
			if err := show(cmd, a, r, text.Status); err != nil {
				return err
			}
			return verdict(r)
		},
	}
	cmd.Flags().BoolVar(&quick, "quick", false, "do not try the slots in the TPM")
	return cmd
}

// Exit codes of status; exitProblem is also that of doctor, usage and keyring check. 2
// belongs to the shell and to flag parsers.
const (
	exitLocked  = 3
	exitProblem = 4
)

// verdict returns the exit code for a status. Locked comes before any other problem: such
// a node does not encrypt.
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
