package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/inspect"
	"github.com/beezy-dev/kleidi/internal/reseal"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/internal/text"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
)

func newBootPolicy(a *app) *cobra.Command {
	return group("bootpolicy", "Record, show, compare and test boot policies, and explain event logs", `A boot policy is a file that says what the event log of a boot must contain. You can
read and edit it; docs/boot-policy.md describes it.`,
		newPolicyRecord(a), newPolicyShow(a), newPolicyCheck(a), newPolicyDiff(a), newPolicyNarrow(a), newPolicyExplain(a), newPolicyEvidence(a))
}

func newPolicyRecord(a *app) *cobra.Command {
	var file string
	var pcrs []int
	cmd := &cobra.Command{
		Use:   "record",
		Short: "Write a boot policy that demands exactly the running boot",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			n, err := a.node()
			if err != nil {
				return err
			}
			p, err := reseal.RecordPolicy(cmd.Context(), n, pcrs)
			if err != nil {
				return files.HintRoot(fmt.Errorf("record: %w", err))
			}
			if file == "" {
				return a.show(cmd.OutOrStdout(), showPolicy(p, ""), func(w io.Writer) { _, _ = w.Write(p.Marshal()) })
			}
			if err := files.WriteNew(file, p.Marshal()); err != nil {
				return fmt.Errorf("record: %w", err)
			}
			return a.show(cmd.OutOrStdout(), showPolicy(p, file), func(w io.Writer) {
				fmt.Fprintf(w, "this boot, of PCR %s (%s), written to %s\n", slotview.JoinPCRs(p.Demanded()), p.Bank, file)
			})
		},
	}
	cmd.Flags().StringVar(&file, "file", "", "new file to write to; standard output if empty")
	cmd.Flags().IntSliceVar(&pcrs, "pcrs", nil, "the PCRs to demand (default: 0 and the PCRs that kleidi seals to)")
	return cmd
}

func newPolicyShow(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "show FILE",
		Short: "Check a boot policy, and show it",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := files.ReadAnyBootPolicy(args[0])
			if err != nil {
				return err
			}
			return a.show(cmd.OutOrStdout(), showPolicy(p, ""), func(w io.Writer) { _, _ = w.Write(p.Marshal()) })
		},
	}
}

// newPolicyCheck returns the verb bootpolicy check. A refused boot is printed with its
// findings, and then fails with exit code 1, so that a script need not read them.
func newPolicyCheck(a *app) *cobra.Command {
	var policy, values, evidence, nonce string
	var logs attest.Logs
	cmd := &cobra.Command{
		Use:   "check --boot-policy FILE (--evidence FILE | --event-log FILE)",
		Short: "Judge saved evidence or a saved event log by a boot policy",
		Long: `Judge the saved evidence or event log of a boot by a boot policy.

--evidence names a file of kleidi bootpolicy evidence, or any other Attestation of
go-tpm-tools. The command verifies the quote first.

--event-log names a log without a quote. With --pcrs, a JSON file of the values that a
TPM quoted ({"sha256": {"4": "…"}}), the log must lead to these values. Without --pcrs
the command believes the log: that serves to test a boot policy, and proves nothing.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var shown any
			var v *bootpolicy.Verdict
			var show func(io.Writer)
			if evidence != "" {
				judged, err := inspect.JudgeEvidence(policy, evidence, nonce)
				if err != nil {
					return err
				}
				shown, v, show = judged, judged.Verdict, func(w io.Writer) { text.Evidence(w, judged) }
			} else {
				var err error
				if v, err = inspect.JudgeLog(policy, logs, values); err != nil {
					return err
				}
				shown, show = v, func(w io.Writer) { text.Verdict(w, v, values == "") }
			}
			err := a.show(cmd.OutOrStdout(), shown, show)
			if err == nil && !v.Accepted {
				err = inspect.ErrRefused
			}
			return err
		},
	}
	cmd.Flags().StringVar(&policy, "boot-policy", "", "the boot policy")
	cmd.Flags().StringVar(&evidence, "evidence", "", "saved evidence: a quote, and the event log")
	cmd.Flags().StringVar(&nonce, "nonce", "", "the nonce that the quote in --evidence must have, in hexadecimal; any nonce if empty")
	cmd.Flags().StringVar(&logs.Firmware, "event-log", "", "the firmware's event log")
	cmd.Flags().StringVar(&logs.Userspace, "userspace-event-log", "", "systemd's log of the same boot (tpm2-measure.log), if there was one")
	cmd.Flags().StringVar(&values, "pcrs", "", "JSON file of the quoted PCR values")
	_ = cmd.MarkFlagRequired("boot-policy")
	cmd.MarkFlagsOneRequired("evidence", "event-log")
	for _, alone := range []string{"event-log", "userspace-event-log", "pcrs"} {
		cmd.MarkFlagsMutuallyExclusive("evidence", alone)
	}
	cmd.MarkFlagsMutuallyExclusive("nonce", "event-log")
	return cmd
}

func newPolicyDiff(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "diff A B",
		Short: "Show how the demands of boot policy B differ from those of A",
		Args:  cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			first, err := files.ReadAnyBootPolicy(args[0])
			if err != nil {
				return err
			}
			second, err := files.ReadAnyBootPolicy(args[1])
			if err != nil {
				return err
			}
			changes := bootpolicy.Diff(first, second)
			return a.show(cmd.OutOrStdout(), policyDiff{changes}, func(w io.Writer) { text.PolicyChanges(w, changes) })
		},
	}
}

func newPolicyExplain(a *app) *cobra.Command {
	var logs attest.Logs
	cmd := &cobra.Command{
		Use:   "explain",
		Short: "Show an event log event by event",
		Long: `Show an event log event by event. "digest" means that the digest proves the text of the
line; "claimed" means that only the log says so.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if logs.Firmware == "" && logs.Userspace != "" {
				return seal.Errorf("", "name the firmware's log of the same boot, too", "--userspace-event-log goes with --event-log")
			}
			cfg, err := a.config()
			if err != nil {
				return err
			}
			if logs.Firmware == "" {
				logs = attest.Logs{Firmware: cfg.TPM.EventLog, Userspace: cfg.TPM.UserspaceEventLog}
			}
			log, err := logs.Read()
			if err != nil {
				return files.HintRoot(err)
			}
			rows := bootpolicy.Explain(log, cfg.Bank())
			return a.show(cmd.OutOrStdout(), shownLog{cfg.TPM.Bank, rows}, func(w io.Writer) { text.Events(w, rows) })
		},
	}
	cmd.Flags().StringVar(&logs.Firmware, "event-log", "", "a saved firmware event log (default: this machine's logs)")
	cmd.Flags().StringVar(&logs.Userspace, "userspace-event-log", "", "systemd's log of the same boot, with --event-log")
	return cmd
}
