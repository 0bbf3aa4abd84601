package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/reseal"
)

func newPolicyNarrow(a *app) *cobra.Command {
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "narrow",
		Short: "Take the boots that are over out of the boot policy",
		Long: `Take out of the boot policy that tpm.bootPolicy names what allows neither the running
boot nor one that a live slot of this node's TPM is sealed to: the boots before an update.

kleidi reseal --next-… adds to the boot policy. When the next boot has opened the keyring,
the TPM's slots for the boot before it are revoked. A token or a server goes by the boot
policy alone, and would still open the keyring in that boot.

Only sequences of digests are taken out. What you have written as text stays, and so do
rules without sequences.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			n, err := a.node()
			if err != nil {
				return err
			}
			defer n.Close()
			r, err := reseal.NarrowPolicy(cmd.Context(), n, dryRun)
			if err != nil {
				return files.HintRoot(fmt.Errorf("narrow: %w", err))
			}
			return a.show(cmd.OutOrStdout(), r, func(w io.Writer) { printNarrowed(w, r) })
		},
	}
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "show what would be taken out, and change nothing")
	return cmd
}

func printNarrowed(w io.Writer, r *reseal.Narrowed) {
	for _, c := range r.Changes {
		fmt.Fprintln(w, c)
	}
	switch {
	case len(r.Changes) == 0:
		fmt.Fprintf(w, "%s allows no boot that is over\n", r.File)
	case !r.DryRun:
		fmt.Fprintf(w, "%s allows these no longer\n", r.File)
	}
}
