package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/store"
)

func (a *app) newKeyringRestore() *cobra.Command {
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
			s, err := operate(cmd.Context(), a, admin.Restore, req, (*node).restore)
			if err != nil {
				return err
			}
			return a.show(cmd.OutOrStdout(), s, func(w io.Writer) { printState(w, s) })
		},
	}
	cmd.Flags().BoolVar(&previous, "previous", false, "restore the previous revision, which kleidi keeps")
	cmd.Flags().StringVar(&identityFile, "identity-file", "", "open it with this recovery identity instead of the TPM")
	cmd.Flags().StringArrayVar(&req.SkipSlots, "skip-slot", nil, "do without this slot of the restored keyring for now; may be repeated")
	cmd.Flags().BoolVar(&req.BreakTwoOfTwo, "break-two-of-two", false, "go on although one wrapper, or the recovery identity, alone opens the KEK then")
	cmd.Flags().StringVar(&trust, "trust-key-id", "", "trust the keyring with this current key ID although the anchor does not vouch for it")
	return cmd
}

func (a *app) readBackup(ctx context.Context, args []string) ([]byte, error) {
	if len(args) == 1 {
		return readFile(args[0], keyring.MaxSize)
	}
	cfg, err := a.config()
	if err != nil {
		return nil, err
	}
	b, err := store.NewFile(cfg.Keyring()).Previous(ctx)
	if err != nil {
		return nil, fmt.Errorf("there is no previous revision: %w", requireRoot(err))
	}
	return b, nil
}

// restore adopts another keyring in the place of the stored one.
func (n *node) restore(ctx context.Context, req admin.RestoreRequest) (admin.KeyringState, error) {
	state, err := n.replace(ctx, func() (admin.KeyringState, error) { return n.restoreFrom(ctx, req) })
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("restore: %w", err)
	}
	return state, nil
}

func (n *node) restoreFrom(ctx context.Context, req admin.RestoreRequest) (admin.KeyringState, error) {
	untrusted, err := keyring.Parse(req.Keyring)
	if err != nil {
		return admin.KeyringState{}, err
	}
	_, version, err := n.keyring.File.Load(ctx)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return admin.KeyringState{}, seal.Errorf(seal.CauseStore, "move that file away, then run the command again", "the stored keyring: %w", err)
	}
	replaced := n.replacedSlots(ctx)
	state, err := n.restoreWith(ctx, untrusted, version, req)
	if err != nil {
		return state, err
	}
	k, err := n.unlocker.Keyring()
	if err == nil {
		state.Changes = slices.Concat(state.Changes, n.comeBack(untrusted.Slots(), replaced, k.Slots()), n.alone(untrusted.Slots(), k.Slots()))
	}
	return state, err
}

// restoreWith puts the keyring in the place of the stored one of that version, with
// the recovery identity or by what opens it here.
func (n *node) restoreWith(ctx context.Context, untrusted *keyring.Untrusted, version store.Version, req admin.RestoreRequest) (admin.KeyringState, error) {
	if len(req.Identity) > 0 {
		if !req.BreakTwoOfTwo {
			if err := n.breaks(seal.TypeRecovery, nil); err != nil { // its slot comes back
				return admin.KeyringState{}, err
			}
		}
		return n.recoverFrom(ctx, untrusted, version, admin.RecoverRequest{Identity: req.Identity, TrustKeyID: req.TrustKeyID, BreakTwoOfTwo: req.BreakTwoOfTwo})
	}
	old, by, err := n.unlocker.OpenUnanchored(ctx, untrusted)
	if err != nil {
		return admin.KeyringState{}, err
	}
	turn := func(ctx context.Context, k *keyring.Keyring) ([]*keyring.Keyring, error) {
		return n.turnIfRoom(ctx, k, req)
	}
	state, err := n.adopt(ctx, old, by, n.openers(), version, req.TrustKeyID, turn, "the keyring is restored; a fresh KEK is current, and all earlier ones still decrypt")
	if err != nil {
		return state, err
	}
	k, err := n.unlocker.Keyring()
	if err == nil {
		state.Changes = append(state.Changes, n.leftOut(k.Slots())...)
	}
	return state, err
}

// full reports whether a keyring has no room to retire its current KEK.
func full(k *keyring.Keyring) bool { return !k.HasRoom() }

// turnIfRoom rotates a restored keyring in the slots that it has, but for those to
// skip; one without room is only raised by a revision, for it has to be stored first
// of all.
func (n *node) turnIfRoom(ctx context.Context, k *keyring.Keyring, req admin.RestoreRequest) ([]*keyring.Keyring, error) {
	if full(k) && len(req.SkipSlots) > 0 {
		return nil, errors.New("--skip-slot: the keyring holds no more retired KEKs, so it comes back under the KEK and in the slots that it has; leave --skip-slot out")
	}
	if !req.BreakTwoOfTwo {
		if err := n.staysBoth(k, req.SkipSlots); err != nil {
			return nil, err
		}
	}
	if !full(k) {
		revisions, err := n.turn(ctx, k, req.BreakTwoOfTwo, req.SkipSlots...)
		return revisions, withIdentityHint(n.withSkipHint(k, err, "run it again with"))
	}
	next, err := k.AtLeast(0)
	return []*keyring.Keyring{next}, err
}

// staysBoth refuses to bring back beside a two-of-two what opens the KEK alone, and
// may have been removed since.
func (n *node) staysBoth(k *keyring.Keyring, without []string) error {
	if n.needsBoth() == "" && !hasBoth(k.Slots()) {
		return nil
	}
	names := slices.DeleteFunc(singles(k.Slots()), func(name string) bool { return slices.Contains(without, name) })
	if len(names) == 0 {
		return nil
	}
	hint := "if that is what you want, add --break-two-of-two"
	if !full(k) { // else no fresh KEK is made that could do without them
		hint += ", else --skip-slot " + strings.Join(names, " --skip-slot ")
	}
	return fmt.Errorf("slots that may have been removed would come back, open the KEK alone, and break two of two: %s; %s", joinWords(names), hint)
}

// singles returns the names of the slots that one wrapper opens alone.
func singles(slots []seal.Slot) (names []string) {
	for i, name := range slotNames(slots) {
		if s := slots[i]; s.Type != seal.TypeSkipped && twoOfTwo(s.Type) == "" {
			names = append(names, name)
		}
	}
	return names
}

// alone says which slots one wrapper opens where two are needed, or were in the backup.
func (n *node) alone(backup, slots []seal.Slot) (changes []string) {
	if names := singles(slots); len(names) > 0 && (n.needsBoth() != "" || hasBoth(backup)) {
		changes = []string{"TWO OF TWO IS BROKEN: each of these slots opens the KEK alone: " + joinWords(names)}
	}
	return changes
}

// replacedSlots returns the slots of the keyring that another one is put in the place
// of: the open one, or else what is stored, which nothing vouches for. They are only
// compared. None are known where that is lost.
func (n *node) replacedSlots(ctx context.Context) []seal.Slot {
	if k, err := n.unlocker.Keyring(); err == nil {
		return k.Slots()
	}
	u, _, err := n.stored(ctx)
	if err != nil {
		return nil
	}
	return u.Slots()
}

// comeBack says which slots a restored keyring has from the backup that the one before
// it did not have; where that is not known, nothing.
func (n *node) comeBack(backup, before, after []seal.Slot) (changes []string) {
	if before == nil {
		return nil
	}
	names := slotNames(after)
	for i, s := range after {
		alike := func(other seal.Slot) bool { return n.alike(other, s) }
		if s.Type != seal.TypeSkipped && slices.ContainsFunc(backup, alike) && !slices.ContainsFunc(before, alike) {
			changes = append(changes, "slot "+names[i]+" is back, which the replaced keyring did not have: "+n.binding(s))
		}
	}
	return changes
}

// alike reports whether two slots are of one wrapper, and of the same recipients.
func (n *node) alike(a, b seal.Slot) bool {
	return a.Type == b.Type && (a.Type != seal.TypeRecovery || n.binding(a) == n.binding(b))
}
