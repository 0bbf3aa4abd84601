package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/operation"
	"github.com/beezy-dev/kleidi/internal/reseal"
)

func newReseal(a *app) *cobra.Command {
	var req admin.ResealRequest
	var files reseal.NextFiles
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "reseal",
		Short: "Seal the KEK to the present boot state, or to the next one before an update",
		Long: `Without --next-…, seal the open KEK to the boot state of now, after a change of
tpm.pcrs or tpm.bank for instance, and revoke the slot of the earlier one: the TPM
refuses it from then on, even where someone kept its bytes. A suspension ends with it.
A locked keyring can't be resealed: after another kernel was booted unprepared, kleidi
recover is the way.

With --new-tpm, after the mainboard was replaced or the TPM was cleared while another
wrapper holds the keyring open, seal a fresh KEK to the TPM that is there. It is trusted
as it is, as at kleidi init.

A KEK that two have to open together is sealed to the TPM alone only with
--break-two-of-two, whatever unlock.order says by now.

With --next-…, compute the next boot state from the files of an update, and seal to it
besides. When the next boot has opened it, kleidi serve revokes the present one. Give
all that changes before one reboot in one command. Nothing is guessed: a boot that can't
be predicted is refused, and the message says what to do.`,
		Example: `  kleidi reseal --next-uki /efi/EFI/Linux/linux-6.12.58.efi
  kleidi reseal --next-kernel /boot/vmlinuz-6.12.58 --next-initrd /boot/initrd.img-6.12.58 \
      --next-grub-config /boot/grub/grub.cfg --running-grub-config grub.cfg.booted
  kleidi reseal --next-dbx dbxupdate_x64.bin`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if nextFilesGiven(cmd, &files) {
				if req.DropNext || req.NewTPM {
					return errors.New("--next-… excludes --drop-next and --new-tpm; give one of them")
				}
				r, err := a.resealNext(cmd, &files, req, dryRun)
				if err != nil {
					return fmt.Errorf("reseal: %w", err)
				}
				return a.show(cmd.OutOrStdout(), r, func(w io.Writer) { printNext(w, r) })
			}
			if dryRun {
				return errors.New("--dry-run shows what a next boot would be; name its files with --next-…")
			}
			s, err := operate(cmd.Context(), a, operation.Reseal, req)
			if err != nil {
				return err
			}
			return a.show(cmd.OutOrStdout(), s, func(w io.Writer) { printState(w, s) })
		},
	}
	registerNextFiles(cmd, &files)
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "show the next boot state, and change nothing")
	cmd.Flags().BoolVar(&req.WithoutVerifier, "without-verifier", false, "demand no verifier, before tpm.verifier is taken out of the configuration")
	cmd.Flags().BoolVar(&req.BreakTwoOfTwo, "break-two-of-two", false, "seal to the TPM alone although the KEK needs it together with another wrapper")
	cmd.Flags().BoolVar(&req.NewTPM, "new-tpm", false, "seal a fresh KEK to another TPM than the slots are sealed to, or to one that was cleared")
	cmd.Flags().BoolVar(&req.DropNext, "drop-next", false, "revoke the slots for next boots as well")
	return cmd
}

func printNext(w io.Writer, r *reseal.NextResult) {
	fmt.Fprintf(w, "next boot       %s, %s\n", r.BootType, r.Bank)
	for _, i := range slices.Sorted(maps.Keys(r.PCRs)) {
		note := ""
		if slices.Contains(r.Moved, i) {
			note = "  changes"
		}
		fmt.Fprintf(w, "  PCR %-2d        %s%s\n", i, r.PCRs[i], note)
	}
	if r.Keyring != nil {
		printState(w, *r.Keyring)
	}
}

// defaultBoots is what a firmware update by capsule takes.
const defaultBoots = 2

func newSuspend(a *app) *cobra.Command {
	var req admin.SuspendRequest
	cmd := &cobra.Command{
		Use:   "suspend",
		Short: "Let other boots open the keyring for a while, before work that can't be predicted",
		Long: `Seal the open KEK to PCR 7 alone besides, so that a firmware update, for instance,
does not lock the node out. Whoever boots this machine meanwhile, with Secure Boot as
it is, gets the KEK. The TPM counts the boots and refuses more than --boots.

When the work is done, run kleidi reseal: it seals to what then runs, and revokes the
slot of the suspension.`,
		Example: `  kleidi suspend
  kleidi suspend --boots 3 --weaken 7`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := operate(cmd.Context(), a, operation.Suspend, req)
			if err != nil {
				return err
			}
			return a.show(cmd.OutOrStdout(), s, func(w io.Writer) { printState(w, s) })
		},
	}
	cmd.Flags().IntVar(&req.Boots, "boots", defaultBoots, "how many boots may open it, 1 to 16")
	cmd.Flags().IntSliceVar(&req.Weaken, "weaken", nil, "the PCRs to let go (default: all but 7)")
	return cmd
}
