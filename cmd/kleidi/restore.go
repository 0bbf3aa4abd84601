package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/operation"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/store"
)

func newKeyringRestore(a *app) *cobra.Command {
	var previous bool
	var identityFile, trust string
	var req admin.RestoreRequest
	cmd := &cobra.Command{
		Use:   "restore [FILE | --previous]",
		Short: "Put a backup, or the previous revision, in the place of the keyring, and rotate",
		Long: `Put a backup, or the previous revision, in the place of the stored keyring. It has to
open, with the TPM or with --identity-file, and to hold the KEK that this node last
trusted. Then the KEK is rotated, so that no key ID ever flips back.

The fresh KEK is wrapped by every wrapper that the restored one is, and slots that were
removed since come back: the command says which. Where a wrapper can't be reached, or is
not to come back, --skip-slot names its slot in the restored keyring. With
--identity-file, what can't be reached is left out without being named.`,
		Example: `  kleidi keyring restore --previous
  kleidi keyring restore /media/usb/keyring.json --identity-file /media/usb/kleidi-recovery.txt`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if previous == (len(args) == 1) {
				return errors.New("name a backup file, or --previous")
			}
			if identityFile != "" && len(req.SkipSlots) > 0 {
				return errors.New("--identity-file excludes --skip-slot: with it, what can't be reached is left out without being named; give one of them")
			}
			var err error
			if req.Keyring, err = a.readBackup(cmd.Context(), args); err != nil {
				return err
			}
			req.TrustKeyID = seal.KeyID(trust)
			if identityFile != "" {
				if req.Identity, err = readIdentity(cmd, identityFile); err != nil {
					return err
				}
				defer clear(req.Identity)
			}
			s, err := operate(cmd.Context(), a, operation.Restore, req)
			if err != nil {
				return err
			}
			return a.show(cmd.OutOrStdout(), s, func(w io.Writer) { printState(w, s) })
		},
	}
	cmd.Flags().BoolVar(&previous, "previous", false, "restore the previous revision, which kleidi keeps")
	cmd.Flags().StringVar(&identityFile, "identity-file", "", "open it with this recovery identity instead of the TPM")
	cmd.Flags().StringArrayVar(&req.SkipSlots, "skip-slot", nil, "do without this slot of the restored keyring for now; may be repeated")
	cmd.Flags().BoolVar(&req.AcceptDataLoss, "accept-data-loss", false, "skip the last recovery slot as well: if the TPM or the machine fails, all Secrets are lost")
	cmd.Flags().BoolVar(&req.BreakTwoOfTwo, "break-two-of-two", false, "go on although one wrapper, or the recovery identity, alone opens the KEK then")
	cmd.Flags().StringVar(&trust, "trust-key-id", "", "trust the keyring with this current key ID although the anchor does not vouch for it")
	return cmd
}

func (a *app) readBackup(ctx context.Context, args []string) ([]byte, error) {
	if len(args) == 1 {
		b, err := files.Read(args[0], keyring.MaxSize)
		if err != nil {
			return nil, err
		}
		if _, err := keyring.Parse(b); err != nil && !errors.Is(err, keyring.ErrNewerFormat) {
			return nil, fmt.Errorf("%s: %w", args[0], seal.WithHint(err, "name a file that kleidi keyring backup wrote, or give --previous"))
		}
		return b, nil
	}
	cfg, err := a.config()
	if err != nil {
		return nil, err
	}
	b, err := store.NewFile(cfg.Keyring()).Previous(ctx)
	if err != nil {
		return nil, fmt.Errorf("there is no previous revision: %w", files.HintRoot(err))
	}
	return b, nil
}
