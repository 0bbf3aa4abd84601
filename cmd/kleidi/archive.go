package main

import (
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/completion"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/operation"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

func newKeyringArchive(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "archive KEYID FILE",
		Short: "Write a retired KEK to a new file, for the recovery recipients",
		Long: `Write the archive of a retired KEK to a new file: the KEK, encrypted to the keyring's
recovery recipients. Only the recovery identity opens it. kleidi prune writes one before
it removes a KEK. Of a KEK that was removed, this command copies the archive that the
cluster store keeps.`,
		Example: "  kleidi keyring archive KEYID /media/usb/kleidi-archive.json",
		Args:    cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			made, err := operate(cmd.Context(), a, operation.ArchiveKEK, admin.ArchiveRequest{KeyID: seal.KeyID(args[0])})
			if err != nil {
				return err
			}
			if err := files.WriteNew(args[1], made.Archive); err != nil {
				return fmt.Errorf("archive: %w", err)
			}
			result := writtenArchive{args[1], made.KeyID, made.Recipients}
			return a.show(cmd.OutOrStdout(), result, func(w io.Writer) {
				fmt.Fprintf(w, "%s holds the KEK of key ID %s, for %s\n", args[1], made.KeyID, seal.OneLine(strings.Join(made.Recipients, ", "), 2000))
			})
		},
	}
	cmd.ValidArgsFunction = a.complete(completion.RetiredKeyIDs)
	return cmd
}

// newKeyringImportArchive returns the verb keyring import-archive. It parses the file
// before it asks for the identity, so that nobody enters a secret in vain.
func newKeyringImportArchive(a *app) *cobra.Command {
	var identityFile, trust string
	cmd := &cobra.Command{
		Use:   "import-archive FILE|KEYID",
		Short: "Put an archived KEK back into the keyring, as a retired one",
		Long: `Put a KEK that kleidi prune removed back into the keyring, as a retired one, with the
recovery identity. What is encrypted under it decrypts again. Name the archive's file, or
the key ID of a KEK whose archive the cluster store keeps. Where several nodes share the
keyring, the others follow.

If the keyring holds no KEK that says who made the archive, name the archived key ID in
--trust-key-id, once you know that this cluster has used it.`,
		Example: "  kleidi keyring import-archive /media/usb/kleidi-archive.json --identity-file /media/usb/kleidi-recovery.txt",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			req := admin.ImportArchiveRequest{TrustKeyID: seal.KeyID(trust)}
			if keyring.ValidKeyID(seal.KeyID(args[0])) {
				req.KeyID = seal.KeyID(args[0])
			} else {
				b, err := files.Read(args[0], keyring.MaxArchiveSize)
				if err != nil {
					return files.HintRoot(fmt.Errorf("import-archive: %w", err))
				}
				if _, err := keyring.ParseArchive(b); err != nil {
					return seal.WithHint(fmt.Errorf("import-archive: %s: %w", args[0], err), "name the archive of a KEK, such as one that kleidi keyring archive KEYID FILE has written")
				}
				req.Archive = b
			}
			identity, err := inputOf(cmd).Identity(cmd.Context(), identityFile)
			if err != nil {
				return err
			}
			defer clear(identity)
			req.Identity = identity
			return operateAndShow(cmd, a, operation.ImportArchive, req)
		},
	}
	cmd.Flags().StringVar(&identityFile, "identity-file", "", "file with the recovery identity (AGE-SECRET-KEY-…)")
	cmd.Flags().StringVar(&trust, "trust-key-id", "", "take the archive of this key ID although the keyring can't tell who made it")
	_ = cmd.MarkFlagFilename("identity-file")
	return cmd
}
