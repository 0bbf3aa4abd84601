package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/completion"
	"github.com/beezy-dev/kleidi/internal/lifecycle"
	"github.com/beezy-dev/kleidi/internal/operation"
	"github.com/beezy-dev/kleidi/seal"
)

func newKeyringRestore(a *app) *cobra.Command {
	var previous bool
	var identityFile, trust string
	var req admin.RestoreRequest
	cmd := &cobra.Command{
		Use:   "restore [FILE | --previous]",
		Short: "Replace the keyring with a backup or with the previous revision, and rotate",
		Long: `Replace the stored keyring with a backup or with the previous revision. The new keyring
must open, with a wrapper in unlock.order or with --identity-file, and hold the KEK that
this node last trusted. The command then rotates the KEK, so that no key ID ever flips
back. A keyring that several nodes share comes back as it was, and keeps its KEK.

The fresh KEK gets a slot for every slot of the restored KEK. Slots that were removed
since the backup come back; the command names them. To leave out a slot, for instance
because its wrapper can't be reached, name the slot with --skip-slot. With
--identity-file the command leaves out unreachable wrappers without --skip-slot.`,
		Example: `  kleidi keyring restore --previous
  kleidi keyring restore /media/usb/keyring.json --identity-file /media/usb/kleidi-recovery.txt`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if previous == (len(args) == 1) {
				return errors.New("name either a backup file or --previous")
			}
			if identityFile != "" && len(req.SkipSlots) > 0 {
				return seal.Errorf("", "give one of them", "--identity-file excludes --skip-slot: with it, what can't be reached is left out without being named")
			}
			var err error
			if req.Keyring, err = a.readBackup(cmd.Context(), args); err != nil {
				return err
			}
			req.TrustKeyID = seal.KeyID(trust)
			if identityFile != "" {
				if req.Identity, err = inputOf(cmd).Identity(cmd.Context(), identityFile); err != nil {
					return err
				}
				defer clear(req.Identity)
			}
			return operateAndShow(cmd, a, operation.Restore, req)
		},
	}
	cmd.Flags().BoolVar(&previous, "previous", false, "restore the previous revision, which kleidi keeps")
	cmd.Flags().StringVar(&identityFile, "identity-file", "", "open the keyring with this recovery identity instead of the TPM")
	cmd.Flags().StringArrayVar(&req.SkipSlots, "skip-slot", nil, "leave out this slot of the restored keyring for now; may be repeated")
	cmd.Flags().BoolVar(&req.AcceptDataLoss, "accept-data-loss", false, "skip the last recovery slot as well: if the TPM or the machine fails, all Secrets are lost")
	cmd.Flags().BoolVar(&req.BreakTwoOfTwo, "break-two-of-two", false, "go on although one wrapper, or the recovery identity, then opens the KEK alone")
	cmd.Flags().StringVar(&trust, "trust-key-id", "", "trust the keyring with this current key ID although the anchor does not vouch for it")
	_ = cmd.MarkFlagFilename("identity-file")
	a.completeFlag(cmd, "skip-slot", completion.SlotNames)
	a.completeFlag(cmd, "trust-key-id", completion.KeyIDs)
	return cmd
}

func (a *app) readBackup(ctx context.Context, args []string) ([]byte, error) {
	if len(args) == 1 {
		return lifecycle.ReadBackup(args[0])
	}
	cfg, err := a.config()
	if err != nil {
		return nil, err
	}
	return lifecycle.ReadPrevious(ctx, cfg)
}
