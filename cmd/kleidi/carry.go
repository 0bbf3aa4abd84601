package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/carry"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/operation"
	"github.com/beezy-dev/kleidi/seal"
)

func newKeyringExport(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "export FILE",
		Short: "Write this node's keyring and record to a new file",
		Long: `Write the keyring that all nodes share, and this node's record, to a new file, for a node
that has no access to the cluster store, or from such a node. Nothing in the file is
secret. On the other node, kleidi keyring import reads it. The file is no backup: it
lacks the slots of this node's TPM.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			e, err := operate(cmd.Context(), a, operation.ExportKeyring, admin.ExportKeyringRequest{})
			if err != nil {
				return err
			}
			b, err := carry.File{Keyring: e.Keyring, Record: e.Record}.Marshal()
			if err == nil {
				err = files.WriteNew(args[0], b)
			}
			if err != nil {
				return fmt.Errorf("export: %w", err)
			}
			return a.show(cmd.OutOrStdout(), exportedKeyring{args[0], e.CurrentKeyID, e.Revision}, func(w io.Writer) {
				fmt.Fprintf(w, "revision %d (key ID %s) and this node's record are in %s\n", e.Revision, e.CurrentKeyID, args[0])
			})
		},
	}
}

func newKeyringImport(a *app) *cobra.Command {
	var trust string
	cmd := &cobra.Command{
		Use:   "import FILE",
		Short: "Take the keyring that another node exported",
		Long: `Take what kleidi keyring export wrote on another node. This node takes the keyring only if
it would take it from the cluster store: if it is newer, under the KEK that this node
trusts or has acknowledged, and lists this node. A node with access to the cluster store
also puts the other node's record there.

At the end of a fork, name the current key ID of the keyring that is kept in
--trust-key-id: this node then takes that keyring although it has left that KEK, if it
holds it.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			b, err := files.Read(args[0], carry.MaxFile)
			if err != nil {
				return fmt.Errorf("import: %w", err)
			}
			f, err := carry.ParseFile(b)
			if err != nil {
				return fmt.Errorf("import: %s: %w", args[0], err)
			}
			return operateAndShow(cmd, a, operation.ImportKeyring, admin.ImportKeyringRequest{Keyring: f.Keyring, Record: f.Record, TrustKeyID: seal.KeyID(trust)})
		},
	}
	cmd.Flags().StringVar(&trust, "trust-key-id", "", "at the end of a fork: the current key ID of the keyring that is kept")
	return cmd
}

func newKeyringPublish(a *app) *cobra.Command {
	var req admin.PublishKeyringRequest
	cmd := &cobra.Command{
		Use:   "publish",
		Short: "Put this node's keyring into the cluster store, in place of another one",
		Long: `Put this node's keyring into the cluster store, in place of another one. It ends a fork:
run it on a node that has the keyring to keep. The KEKs that only the other keyring holds
are retired into this node's, so that nothing is lost. The nodes that do not follow by
themselves take the keyring with kleidi keyring import FILE --trust-key-id KEY_ID.

With --discard the command replaces a keyring that no node takes: a damaged one, or one
that somebody has planted. Whatever only that keyring holds is lost.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return operateAndShow(cmd, a, operation.PublishKeyring, req)
		},
	}
	cmd.Flags().BoolVar(&req.Discard, "discard", false, "take no KEK of the keyring in the store")
	return cmd
}
