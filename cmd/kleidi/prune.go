package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/completion"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/lifecycle"
	"github.com/beezy-dev/kleidi/internal/operation"
	"github.com/beezy-dev/kleidi/internal/prune"
	"github.com/beezy-dev/kleidi/internal/text"
	"github.com/beezy-dev/kleidi/seal"
)

// pruning holds the flags of prune.
type pruning struct {
	from    stores
	archive string
	yes     bool
	records []string
}

func newPrune(a *app) *cobra.Command {
	o := pruning{from: stores{live: true}}
	cmd := &cobra.Command{
		Use:   "prune KEYID",
		Short: "Remove a retired KEK under which nothing is stored",
		Long: `Remove a retired KEK from the keyring, with the proof that nothing needs it: no object
in etcd is under it, nor one in any snapshot that --snapshot names as kept, and the
kube-apiserver of every node encrypts under the current KEK. Name every etcd of
kube-apiserver and every snapshot that you keep: the KEK is needed as long as one of them
needs it.

First kleidi archives the KEK for the keyring's recovery recipients, and the command reads
the archive back. Only the recovery identity opens it. Keep the archive apart from this
machine, as long as an older backup of etcd may turn up; kleidi keyring import-archive
brings the KEK back. Where the nodes share a cluster store, the store keeps the archive,
too. Then the command asks, reads etcd once more, and removes the KEK.`,
		Example: "  kleidi prune KEYID --snapshot=etcd.db --archive /media/usb/kleidi-archive.json",
		Args:    cobra.ExactArgs(1),
		RunE:    func(cmd *cobra.Command, args []string) error { return o.run(cmd, a, seal.KeyID(args[0])) },
	}
	o.from.addFlags(cmd)
	cmd.Flags().StringVar(&o.archive, "archive", "", "the new file for the archive (default in the state folder)")
	cmd.Flags().StringArrayVar(&o.records, "record", nil, "what kleidi keyring export wrote on another node, where the nodes share no cluster store; may be repeated")
	cmd.Flags().BoolVar(&o.yes, "yes", false, "do not ask")
	_ = cmd.MarkFlagFilename("archive", "json")
	_ = cmd.MarkFlagFilename("record")
	cmd.ValidArgsFunction = a.complete(completion.RetiredKeyIDs)
	return cmd
}

// run reads etcd three times. The first time spares the operator a file and a question in
// vain. The second time is the proof: serve has confirmed just before that every
// kube-apiserver encrypts under the current KEK, so nothing is stored under the old one
// afterwards. The third time, after the KEK is gone, finds what a restore of etcd brought
// back meanwhile. Snapshots don't change, and are read once. The archive is on disk, and
// read back, before the question.
func (o *pruning) run(cmd *cobra.Command, a *app, id seal.KeyID) error {
	req, err := o.archiveUnused(cmd, a, id)
	if err != nil {
		return err
	}
	if err := confirmPrune(cmd, o.yes); err != nil {
		return err
	}
	// After this check kube-apiserver stores nothing under the KEK. Before it, it may have.
	if _, err := operate(cmd.Context(), a, operation.Prune, req); err != nil {
		return err
	}
	last := o.from
	last.snapshots = nil
	if err := proveUnused(cmd, &last, id); err != nil {
		return err
	}
	req.Check = false
	s, err := operate(cmd.Context(), a, operation.Prune, req)
	if err != nil {
		return err
	}
	s.Changes = append(s.Changes, "the archive still holds it, for the recovery identity: "+o.archive)
	if err := show(cmd, a, s, text.State); err != nil {
		return err
	}
	if err := proveUnused(cmd, &last, id); err != nil {
		return seal.AddHint(fmt.Errorf("after the KEK was removed: %w", err), "to bring it back, run kleidi keyring import-archive "+seal.Quote(o.archive))
	}
	return nil
}

// archiveUnused proves that nothing is stored under a retired KEK, archives the KEK, and
// has serve check the archive. It returns the request that checks whether the KEK may go.
func (o *pruning) archiveUnused(cmd *cobra.Command, a *app, id seal.KeyID) (req admin.PruneRequest, err error) {
	cfg, err := a.config()
	if err != nil {
		return req, err
	}
	u, _, err := lifecycle.ReadStored(cmd.Context(), cfg)
	if err == nil {
		err = prune.CheckRetired(u.Info(), id)
	}
	if err != nil {
		return req, fmt.Errorf("prune: %w", err)
	}
	req = admin.PruneRequest{KeyID: id, Check: true}
	if req.Records, err = prune.ReadRecords(o.records); err != nil {
		return req, err
	}
	made, err := operate(cmd.Context(), a, operation.ArchiveKEK, admin.ArchiveRequest{KeyID: id, ForPrune: true, Records: req.Records})
	if err != nil {
		return req, err
	}
	if err := proveUnused(cmd, &o.from, id); err != nil {
		return req, err
	}
	if o.archive == "" {
		o.archive = cfg.ArchivePath(id)
	}
	if req.Archive, err = prune.Keep(o.archive, made.Archive); err != nil {
		return req, files.HintRoot(fmt.Errorf("prune: %w", err))
	}
	// The file may be older than this command: serve says whether it is an archive.
	if _, err := operate(cmd.Context(), a, operation.Prune, req); err != nil {
		return req, err
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "nothing is stored under %s\nthe archive was read back, and holds it: %s\n", id, o.archive)
	return req, nil
}

// proveUnused reads every store, and refuses if an object is or may be under a key ID.
func proveUnused(cmd *cobra.Command, from *stores, id seal.KeyID) error {
	reports, err := from.read(cmd)
	if err != nil {
		return fmt.Errorf("prune: %w", err)
	}
	return prune.Unused(reports, id)
}

// confirmPrune asks a person at a terminal. It takes no answer from a pipe, only --yes.
func confirmPrune(cmd *cobra.Command, yes bool) error {
	if yes {
		return nil
	}
	answer, asked, err := inputOf(cmd).Ask("are these all etcds of kube-apiserver, and all snapshots that you keep? Type yes to remove the KEK: ")
	switch {
	case err != nil:
		return fmt.Errorf("prune: %w", err)
	case !asked:
		return seal.Errorf("", "give --yes", "prune: not confirmed, because there is no terminal to ask at; nothing was changed")
	case answer != "yes":
		return errors.New("prune: not confirmed; nothing was changed")
	}
	return nil
}
