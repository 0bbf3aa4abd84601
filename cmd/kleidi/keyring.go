package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/lifecycle"
	"github.com/beezy-dev/kleidi/internal/operation"
	"github.com/beezy-dev/kleidi/internal/text"
	"github.com/beezy-dev/kleidi/internal/usage"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

func newKeyring(a *app) *cobra.Command {
	return group("keyring", "Show, verify, back up and restore the keyring", "",
		newKeyringShow(a), newKeyringVerify(a), newKeyringCheck(a), newKeyringBackup(a), newKeyringRestore(a), newKeyringSave(a), newKeyringExport(a), newKeyringImport(a), newKeyringPublish(a), newKeyringArchive(a), newKeyringImportArchive(a))
}

func newKeyringShow(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "show",
		Short: "Show the stored keyring, without verifying it",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			n, err := a.node()
			if err != nil {
				return err
			}
			u, _, err := lifecycle.ReadStored(cmd.Context(), n.Config)
			if err != nil {
				return err
			}
			shown := shownKeyring{u.Info(), u.Slots()}
			return a.show(cmd.OutOrStdout(), shown, func(w io.Writer) { text.Keyring(w, u, n.View.Binding) })
		},
	}
}

func newKeyringVerify(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "verify",
		Short: "Open the stored keyring with the TPM and check it against MAC and anchor",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return operateAndShow(cmd, a, operation.Verify, admin.VerifyRequest{})
		},
	}
}

func newKeyringBackup(a *app) *cobra.Command {
	var snapshot, prefix string
	cmd := &cobra.Command{
		Use:   "backup FILE",
		Short: "Copy the stored keyring to a new file",
		Long: `Copy the stored keyring to a new file. A keyring holds no unencrypted key: it opens
only in its slots, as with this machine's TPM in its boot state or with the recovery
identity. Make a copy after every rotation: an etcd backup needs the KEKs under which it
was written.

With --from-snapshot the command copies the keyring that the nodes shared in the cluster's
API when the snapshot of etcd was taken. It lacks the slots of every node's TPM: restore it
with the recovery identity.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			u, b, err := a.keyringToKeep(cmd, snapshot, prefix)
			if err != nil {
				return err
			}
			if err := files.WriteNew(args[0], b); err != nil {
				return fmt.Errorf("backup: %w", err)
			}
			result := backedUpKeyring{args[0], u.CurrentID(), u.Revision()}
			return a.show(cmd.OutOrStdout(), result, func(w io.Writer) {
				fmt.Fprintf(w, "revision %d (key ID %s) copied to %s\n", u.Revision(), u.CurrentID(), args[0])
			})
		},
	}
	cmd.Flags().StringVar(&snapshot, "from-snapshot", "", "copy the shared keyring in this file of an etcd snapshot")
	cmd.Flags().StringVar(&prefix, "prefix", usage.DefaultPrefix, "kube-apiserver's --etcd-prefix")
	_ = cmd.MarkFlagFilename("from-snapshot")
	return cmd
}

// keyringToKeep returns the stored keyring, or the keyring in a snapshot.
func (a *app) keyringToKeep(cmd *cobra.Command, snapshot, prefix string) (*keyring.Untrusted, []byte, error) {
	if snapshot == "" {
		cfg, err := a.config()
		if err != nil {
			return nil, nil, err
		}
		return lifecycle.ReadStored(cmd.Context(), cfg)
	}
	from := stores{snapshots: []string{snapshot}, prefix: prefix}
	reports, err := from.read(cmd)
	if err != nil {
		return nil, nil, err
	}
	b, err := reports[0].SharedKeyring()
	if err != nil {
		return nil, nil, err
	}
	u, err := keyring.Parse(b)
	return u, b, err
}

func newKeyringSave(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "save",
		Short: "Replace the stored keyring with the one that kleidi serve holds open",
		Long: `Replace the stored keyring with the one that the running kleidi serve holds open. Use
this if the stored keyring was lost, damaged or replaced by an older one. Until then do
not restart kleidi serve: the newest KEKs are only in its memory.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return operateAndShow(cmd, a, operation.Save, admin.SaveRequest{})
		},
	}
}
