package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/lifecycle"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/operation"
	"github.com/beezy-dev/kleidi/internal/prune"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

func newPrune(a *app) *cobra.Command {
	from := stores{live: true}
	var archive string
	var yes bool
	cmd := &cobra.Command{
		Use:   "prune KEYID",
		Short: "Remove a retired KEK under which nothing is stored any more",
		Long: `Remove a retired KEK from the keyring, with the proof that nothing needs it: no object
in etcd is under it, nor one in any snapshot that --snapshot names as kept, and
kube-apiserver's last call was under the current KEK. Name every etcd of kube-apiserver
and every snapshot that you keep: the KEK is needed as long as one of them needs it.

First the command archives the keyring, which still holds the KEK, and reads the copy back.
The archive opens with the recovery identity. Keep it with the recovery identity, apart
from this machine, as long as an older backup of etcd may turn up; kleidi keyring restore
brings it back. Then the command asks, reads etcd once more, and removes the KEK.`,
		Example: "  kleidi prune KEYID --snapshot=etcd.db --archive /media/usb/kleidi-archive.json",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id := seal.KeyID(args[0])
			cfg, err := a.config()
			if err != nil {
				return err
			}
			u, stored, err := lifecycle.ReadStored(cmd.Context(), cfg)
			if err == nil {
				err = prune.CheckRetired(u.Info(), id)
			}
			if err != nil {
				return fmt.Errorf("prune: %w", err)
			}
			if err := proveUnused(cmd, &from, id); err != nil {
				return err
			}
			if archive == "" {
				archive = filepath.Join(cfg.State.Dir, "archive-"+string(id)+".json")
			}
			sum, err := prune.Archive(archive, stored, id)
			if err != nil {
				return files.HintRoot(fmt.Errorf("prune: %w", err))
			}
			w := cmd.ErrOrStderr()
			fmt.Fprintf(w, "nothing is stored under %s\narchived and read back: %s\n", id, archive)
			if err := confirmPrune(cmd, yes); err != nil {
				return err
			}
			// From this check on kube-apiserver stores nothing under the KEK. Before it,
			// somebody may have.
			req := admin.PruneRequest{KeyID: id, Archived: sum, Check: true}
			if _, err := operate(cmd.Context(), a, operation.Prune, req); err != nil {
				return err
			}
			last := from
			last.snapshots = nil
			if err := proveUnused(cmd, &last, id); err != nil {
				return err
			}
			req.Check = false
			s, err := operate(cmd.Context(), a, operation.Prune, req)
			if err != nil {
				return err
			}
			s.Changes = append(s.Changes, "the archive still holds it, for the recovery identity: "+archive)
			if err := a.show(cmd.OutOrStdout(), s, func(w io.Writer) { printState(w, s) }); err != nil {
				return err
			}
			if err := proveUnused(cmd, &last, id); err != nil {
				return seal.AddHint(fmt.Errorf("after the KEK was removed: %w", err), "to bring it back, run kleidi keyring restore "+seal.Quote(archive))
			}
			return nil
		},
	}
	from.addFlags(cmd)
	cmd.Flags().StringVar(&archive, "archive", "", "the new file for the archive (default in the state folder)")
	cmd.Flags().BoolVar(&yes, "yes", false, "do not ask")
	_ = cmd.MarkFlagFilename("archive", "json")
	cmd.ValidArgsFunction = a.complete(retiredIDs)
	return cmd
}

func retiredIDs(_ *node.Node, u *keyring.Untrusted) (all []string) {
	for _, r := range u.Info().Retired {
		all = append(all, string(r.KeyID))
	}
	return all
}

// proveUnused reads every store, and refuses if an object is or may be under a key ID.
func proveUnused(cmd *cobra.Command, from *stores, id seal.KeyID) error {
	reports, err := from.read(cmd)
	if err != nil {
		return fmt.Errorf("prune: %w", err)
	}
	var all []string
	snapshots := 0
	for _, r := range reports {
		under, unknown := r.Under(string(id))
		if under > 0 {
			all = append(all, fmt.Sprintf("%s holds %s under it", seal.OneLine(r.Source, 200), counted(under, "object")))
		}
		if unknown > 0 {
			all = append(all, fmt.Sprintf("%s holds %s that may be under it: damaged, or encrypted in a way that kleidi does not know", seal.OneLine(r.Source, 200), counted(unknown, "object")))
		}
		if r.Snapshot != nil && under+unknown > 0 {
			snapshots++
		}
		if r.Snapshot != nil && !r.Snapshot.Checked {
			all = append(all, r.Source+" has no checksum, so that it proves nothing")
		}
	}
	if len(all) == 0 {
		return nil
	}
	hint := "run kleidi migrate, and see with kleidi usage what is left"
	if snapshots > 0 {
		hint = "keep the KEK as long as you keep the snapshot"
	}
	return &seal.Error{Err: fmt.Errorf("prune: %s is needed: %s", seal.OneLine(string(id), 100), strings.Join(all, "; ")), Hint: hint}
}

func confirmPrune(cmd *cobra.Command, yes bool) error {
	if yes {
		return nil
	}
	in, ok := cmd.InOrStdin().(*os.File)
	if !ok || !isTerminal(in) {
		return &seal.Error{Err: errors.New("prune: nobody has confirmed it, and there is no terminal to ask at; nothing was changed"), Hint: "give --yes"}
	}
	fmt.Fprint(cmd.ErrOrStderr(), "are these all etcds of kube-apiserver, and all snapshots that you keep? Type yes to remove the KEK: ")
	answer, err := readLine(in)
	if err != nil {
		return fmt.Errorf("prune: %w", err)
	}
	if strings.TrimSpace(string(answer)) != "yes" {
		return errors.New("prune: not confirmed; nothing was changed")
	}
	return nil
}
