package main

import (
	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/completion"
	"github.com/beezy-dev/kleidi/internal/operation"
	"github.com/beezy-dev/kleidi/seal"
)

// newRecover returns the verb recover. This process reads the identity, since serve has no
// terminal, and clears it when the operation has ended.
func newRecover(a *app) *cobra.Command {
	var file, trust string
	var withoutVerifier, breakTwoOfTwo bool
	cmd := &cobra.Command{
		Use:   "recover",
		Short: "Open a locked keyring with the recovery identity, seal it again and rotate",
		Long: `Open the keyring with the recovery identity, seal a fresh KEK to this machine's
present boot state and make it current. All earlier KEKs are retired and still
decrypt, so nothing is lost. Slots of the earlier boot state are revoked. If several
nodes share the keyring, they keep their KEK, and only this node seals it again.

The command asks for the identity, or reads it from standard input or from --identity-file.`,
		Example: `  kleidi recover
  kleidi recover --identity-file /media/usb/kleidi-recovery.txt`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			identity, err := inputOf(cmd).Identity(cmd.Context(), file)
			if err != nil {
				return err
			}
			defer clear(identity)
			req := admin.RecoverRequest{Identity: identity, TrustKeyID: seal.KeyID(trust), WithoutVerifier: withoutVerifier, BreakTwoOfTwo: breakTwoOfTwo}
			return operateAndShow(cmd, a, operation.Recover, req)
		},
	}
	cmd.Flags().StringVar(&file, "identity-file", "", "file with the recovery identity (AGE-SECRET-KEY-…)")
	cmd.Flags().BoolVar(&breakTwoOfTwo, "break-two-of-two", false, "go on although one wrapper, or the recovery identity, then opens the KEK alone")
	cmd.Flags().BoolVar(&withoutVerifier, "without-verifier", false, "demand no verifier, because it is gone for good")
	cmd.Flags().StringVar(&trust, "trust-key-id", "", "trust the keyring with this current key ID although the anchor does not vouch for it")
	_ = cmd.MarkFlagFilename("identity-file")
	a.completeFlag(cmd, "trust-key-id", completion.CurrentKeyID)
	return cmd
}
