package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/operation"
	"github.com/beezy-dev/kleidi/internal/reseal"
	"github.com/beezy-dev/kleidi/internal/text"
	"github.com/beezy-dev/kleidi/seal"
)

// resealing holds the flags of reseal.
type resealing struct {
	req    admin.ResealRequest
	files  reseal.NextFiles
	dryRun bool
}

func newReseal(a *app) *cobra.Command {
	var o resealing
	cmd := &cobra.Command{
		Use:   "reseal",
		Short: "Seal the KEK to the present boot state, or to the next one before an update",
		Long: `Before an update, run it with --next-…: the command predicts the next boot state from
the files of the update, and seals the KEK to it in addition. After the next boot has
opened the keyring, kleidi serve revokes the present boot state. Name all files that
change before one reboot in one command. Nothing is guessed: the command refuses a boot
that it can't predict, and says what to do.

Without --next-…, seal the open KEK to the present boot state, for instance after a
change of tpm.pcrs or tpm.bank, and revoke the earlier slot: from then on the TPM
refuses the slot and every kept copy of it. That also ends a suspension. A locked
keyring can't be resealed: after an unprepared boot of another kernel, use kleidi
recover.

With --new-tpm, seal a fresh KEK to the present TPM, after the mainboard was replaced
or the TPM was cleared and another wrapper holds the keyring open. The command trusts
that TPM without a check, as kleidi init does.

If two wrappers must open the KEK together, the command seals it to the TPM alone only
with --break-two-of-two, whatever unlock.order says now.`,
		Example: `  kleidi reseal --next-uki /efi/EFI/Linux/linux-6.12.58.efi
  kleidi reseal --next-kernel /boot/vmlinuz-6.12.58 --next-initrd /boot/initrd.img-6.12.58 \
      --next-grub-config /boot/grub/grub.cfg --running-grub-config grub.cfg.booted
  kleidi reseal --next-dbx dbxupdate_x64.bin`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return o.run(cmd, a) },
	}
	registerNextFiles(cmd, &o.files)
	cmd.Flags().BoolVar(&o.dryRun, "dry-run", false, "show the next boot state, and change nothing")
	cmd.Flags().BoolVar(&o.req.WithoutVerifier, "without-verifier", false, "demand no verifier, before you remove tpm.verifier from the configuration")
	cmd.Flags().BoolVar(&o.req.BreakTwoOfTwo, "break-two-of-two", false, "seal to the TPM alone although the KEK needs the TPM and another wrapper together")
	cmd.Flags().BoolVar(&o.req.NewTPM, "new-tpm", false, "seal a fresh KEK to a replaced or cleared TPM")
	cmd.Flags().BoolVar(&o.req.DropNext, "drop-next", false, "revoke the slots for next boots as well")
	return cmd
}

// run seals to the next boot if its files are named, and else to the present one.
func (o *resealing) run(cmd *cobra.Command, a *app) error {
	if nextFilesGiven(cmd, &o.files) {
		if o.req.DropNext || o.req.NewTPM {
			return seal.Errorf("", "give one of them", "--next-… excludes --drop-next and --new-tpm")
		}
		r, err := a.resealNext(cmd, &o.files, o.req, o.dryRun)
		if err != nil {
			return fmt.Errorf("reseal: %w", err)
		}
		return show(cmd, a, r, text.Next)
	}
	if err := runningAlone(cmd, &o.files); err != nil {
		return err
	}
	if o.dryRun {
		return seal.Errorf("", "name its files with --next-…", "--dry-run shows what a next boot would be")
	}
	return operateAndShow(cmd, a, operation.Reseal, o.req)
}

// defaultBoots is the number of boots that a firmware update by capsule takes.
const defaultBoots = 2

func newSuspend(a *app) *cobra.Command {
	var req admin.SuspendRequest
	cmd := &cobra.Command{
		Use:   "suspend",
		Short: "Let other boots open the keyring for a while, before work that can't be predicted",
		Long: `Seal the open KEK to fewer PCRs in addition, so that a boot that can't be predicted opens
the keyring. Until the suspension ends, any boot of this machine with the same values of
those PCRs gets the KEK. The TPM counts the boots and refuses more than --boots.

By default only PCR 7 must stay the same, which holds Secure Boot's state and keys: this is
for another boot loader or kernel. With --weaken 7 everything else must stay the same: this
is for a firmware update that may bring keys or revocations, and for other keys.

When the work is done, run kleidi reseal: it seals to the boot that then runs, and
revokes the slot of the suspension.`,
		Example: `  kleidi suspend --boots 1               # before another boot loader or kernel
  kleidi suspend --boots 2 --weaken 7    # before a firmware update, or other Secure Boot keys`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return operateAndShow(cmd, a, operation.Suspend, req)
		},
	}
	cmd.Flags().IntVar(&req.Boots, "boots", defaultBoots, "how many boots may open the keyring, 1 to 16")
	cmd.Flags().IntSliceVar(&req.Weaken, "weaken", nil, "the PCRs to ignore (default: all but 7)")
	return cmd
}
