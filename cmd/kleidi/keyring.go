package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/store"
)

func (a *app) newKeyring() *cobra.Command {
	cmd := &cobra.Command{
		Use: "keyring", Short: "Show, verify, back up and restore the keyring",
		Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(a.newKeyringShow(), a.newKeyringVerify(), a.newKeyringBackup(), a.newKeyringRestore(), a.newKeyringSave())
	return cmd
}

// readStored reads a keyring file for people; nothing has vouched for it.
func readStored(ctx context.Context, cfg *config.Config) (*keyring.Untrusted, []byte, error) {
	b, _, err := store.NewFile(cfg.Keyring()).Load(ctx)
	if err != nil {
		return nil, nil, requireRoot(keyringMissing(err))
	}
	u, err := keyring.Parse(b)
	return u, b, err
}

func (a *app) newKeyringShow() *cobra.Command {
	return &cobra.Command{
		Use:   "show",
		Short: "Show the stored keyring, without verifying it",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			n, err := a.node()
			if err != nil {
				return err
			}
			u, _, err := readStored(cmd.Context(), n.cfg)
			if err != nil {
				return err
			}
			shown := struct {
				keyring.Info
				Slots []seal.Slot `json:"slots"`
			}{u.Info(), u.Slots()}
			return a.show(cmd.OutOrStdout(), shown, func(w io.Writer) { printKeyring(w, u, n) })
		},
	}
}

func printKeyring(w io.Writer, u *keyring.Untrusted, n *node) {
	i := u.Info()
	row(w, "cluster ID", i.ClusterID.String())
	row(w, "revision", fmt.Sprint(i.Revision))
	row(w, "current KEK", fmt.Sprintf("%s  made %s", i.Current.KeyID, i.Current.Created.Local().Format(time.DateTime)))
	for _, s := range u.Slots() {
		row(w, "  slot", s.Type+"  "+s.Node+"  "+n.binding(s))
	}
	for _, r := range i.Retired {
		row(w, "retired KEK", fmt.Sprintf("%s  made %s, retired %s", r.KeyID, r.Created.Local().Format(time.DateTime), r.Retired.Local().Format(time.DateTime)))
	}
	for _, node := range i.Nodes {
		row(w, "node", node.Name+"  EK "+node.EK)
	}
	fmt.Fprintln(w, "\nnot verified; kleidi keyring verify does that")
}

func (a *app) newKeyringVerify() *cobra.Command {
	return &cobra.Command{
		Use:   "verify",
		Short: "Open the stored keyring with the TPM and check it against MAC and anchor",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := operate(cmd.Context(), a, admin.Verify, admin.VerifyRequest{}, (*node).verify)
			if err != nil {
				return err
			}
			return a.show(cmd.OutOrStdout(), s, func(w io.Writer) { printState(w, s) })
		},
	}
}

func (a *app) newKeyringBackup() *cobra.Command {
	return &cobra.Command{
		Use:   "backup FILE",
		Short: "Copy the stored keyring to a new file",
		Long: `Copy the stored keyring to a new file. A keyring holds no key in clear: it opens with
this machine's TPM in its boot state, or with the recovery identity. Make a copy
after every rotation: etcd backups need the KEKs that they were written under.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := a.config()
			if err != nil {
				return err
			}
			u, b, err := readStored(cmd.Context(), cfg)
			if err != nil {
				return err
			}
			if err := writeNew(args[0], b); err != nil {
				return fmt.Errorf("backup: %w", err)
			}
			result := map[string]any{"file": args[0], "keyID": u.CurrentID(), "revision": u.Revision()}
			return a.show(cmd.OutOrStdout(), result, func(w io.Writer) {
				fmt.Fprintf(w, "revision %d (key ID %s) copied to %s\n", u.Revision(), u.CurrentID(), args[0])
			})
		},
	}
}

// writeNew writes a file that did not exist, durably.
func writeNew(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%w; name another file", err)
	}
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Sync(), f.Close(), syncFolder(path))
	if err != nil {
		return errors.Join(err, os.Remove(path))
	}
	return nil
}

// syncFolder makes a new file's name durable.
func syncFolder(path string) error {
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

func (a *app) newKeyringSave() *cobra.Command {
	return &cobra.Command{
		Use:   "save",
		Short: "Write the keyring that kleidi serve holds open in the place of the stored one",
		Long: `Write the keyring that the running kleidi serve holds open in the place of the stored
one, which was lost, damaged or replaced by an older one meanwhile. Until that is
done, don't restart kleidi serve: its memory is the only place of the newest KEKs.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := operate(cmd.Context(), a, admin.Save, admin.SaveRequest{}, func(*node, context.Context, admin.SaveRequest) (admin.KeyringState, error) {
				return admin.KeyringState{}, errors.New("kleidi serve does not run, so nothing holds a keyring open; see kleidi keyring restore")
			})
			if err != nil {
				return err
			}
			return a.show(cmd.OutOrStdout(), s, func(w io.Writer) { printState(w, s) })
		},
	}
}

// save writes the open keyring back.
func (n *node) save(ctx context.Context, _ admin.SaveRequest) (admin.KeyringState, error) {
	if err := store.PrepareDir(n.cfg.State.Dir); err != nil { // it may be gone with the keyring
		return admin.KeyringState{}, fmt.Errorf("save: %w", err)
	}
	if err := n.unlocker.Save(ctx); err != nil {
		return admin.KeyringState{}, fmt.Errorf("save: %w", err)
	}
	id, err := n.unlocker.CurrentID()
	if err != nil {
		return admin.KeyringState{}, err
	}
	return n.result(id, "the open keyring is stored again; what it replaced, if it could be read, is the previous revision")
}
