package main

import (
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/lifecycle"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/operation"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

func newKeyring(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use: "keyring", Short: "Show, verify, back up and restore the keyring",
		Args: noVerb, RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newKeyringShow(a), newKeyringVerify(a), newKeyringCheck(a), newKeyringBackup(a), newKeyringRestore(a), newKeyringSave(a), newKeyringExport(a), newKeyringImport(a), newKeyringPublish(a))
	return cmd
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
			return a.show(cmd.OutOrStdout(), shown, func(w io.Writer) { printKeyring(w, u, n) })
		},
	}
}

func printKeyring(w io.Writer, u *keyring.Untrusted, n *node.Node) {
	i := u.Info()
	row(w, "cluster ID", i.ClusterID.String())
	row(w, "revision", fmt.Sprint(i.Revision))
	row(w, "current KEK", fmt.Sprintf("%s  made %s", i.Current.KeyID, i.Current.Created.Local().Format(time.DateTime)))
	for _, s := range u.Slots() {
		row(w, "  slot", s.Type+"  "+s.Node+"  "+n.View.Binding(s))
	}
	for _, r := range i.Retired {
		row(w, "retired KEK", fmt.Sprintf("%s  made %s, retired %s", r.KeyID, r.Created.Local().Format(time.DateTime), r.Retired.Local().Format(time.DateTime)))
	}
	for _, node := range i.Nodes {
		row(w, "node", node.Name+"  EK "+node.EK)
	}
	fmt.Fprintln(w, "\nnot verified; kleidi keyring verify does that")
}

func newKeyringVerify(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "verify",
		Short: "Open the stored keyring with the TPM and check it against MAC and anchor",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := operate(cmd.Context(), a, operation.Verify, admin.VerifyRequest{})
			if err != nil {
				return err
			}
			return a.show(cmd.OutOrStdout(), s, func(w io.Writer) { printState(w, s) })
		},
	}
}

func newKeyringBackup(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "backup FILE",
		Short: "Copy the stored keyring to a new file",
		Long: `Copy the stored keyring to a new file. A keyring holds no unencrypted key: it opens
with this machine's TPM in its boot state, or with the recovery identity. Make a copy
after every rotation: an etcd backup needs the KEKs under which it was written.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			u, b, err := lifecycle.ReadStored(cmd.Context(), cfg)
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
			s, err := operate(cmd.Context(), a, operation.Save, admin.SaveRequest{})
			if err != nil {
				return err
			}
			return a.show(cmd.OutOrStdout(), s, func(w io.Writer) { printState(w, s) })
		},
	}
}
