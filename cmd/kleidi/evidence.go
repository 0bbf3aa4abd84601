package main

import (
	"encoding/hex"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/inspect"
	"github.com/beezy-dev/kleidi/internal/reseal"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/tpm/attest"
)

// newPolicyEvidence returns the verb bootpolicy evidence. It verifies the quote here
// before it writes the file, so that a fault shows on this machine and not at the
// verifier.
func newPolicyEvidence(a *app) *cobra.Command {
	var file, nonce string
	var pcrs []int
	cmd := &cobra.Command{
		Use:   "evidence --file FILE",
		Short: "Save a fresh quote and the event log of the running boot, for a verifier",
		Long: `Save a fresh quote and the event log of the running boot as an Attestation of
go-tpm-tools (protobuf). kleidi bootpolicy check and other verifiers can judge it. A
verifier that needs fresh evidence must choose the nonce.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			fresh, err := inspect.ParseNonce(nonce)
			if err != nil {
				return err
			}
			n, err := a.node()
			if err != nil {
				return err
			}
			if pcrs, err = reseal.RecordedPCRs(n, pcrs); err != nil {
				return files.HintRoot(fmt.Errorf("evidence: %w", err))
			}
			e, err := n.Gate.Collect(cmd.Context(), nil, fresh, n.Config.Bank(), pcrs)
			if err == nil {
				_, err = attest.Verify(e, fresh, n.Config.Bank(), pcrs)
			}
			if err != nil {
				return files.HintRoot(fmt.Errorf("evidence: %w", err))
			}
			b, err := e.Marshal()
			if err == nil {
				err = files.WriteNew(file, b)
			}
			if err != nil {
				return fmt.Errorf("evidence: %w", err)
			}
			result := savedEvidence{file, n.Config.TPM.Bank, pcrs, hex.EncodeToString(fresh), inspect.KeyDigest(e)}
			return a.show(cmd.OutOrStdout(), result, func(w io.Writer) {
				fmt.Fprintf(w, "quote over PCR %s (%s) with nonce %x, and the event log, written to %s\n", slotview.JoinPCRs(pcrs), n.Config.TPM.Bank, fresh, file)
			})
		},
	}
	cmd.Flags().StringVar(&file, "file", "", "new file to write to")
	cmd.Flags().StringVar(&nonce, "nonce", "", "the verifier's nonce, 16 to 64 bytes in hexadecimal; a random one if empty")
	cmd.Flags().IntSliceVar(&pcrs, "pcrs", nil, "the PCRs to quote (default: 0 and the PCRs that kleidi seals to)")
	_ = cmd.MarkFlagRequired("file")
	return cmd
}
