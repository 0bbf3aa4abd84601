package prune

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/recovery"
	"github.com/beezy-dev/kleidi/seal/store"
)

// ArchiveKEK returns the archive of a retired KEK, or the archive of a removed KEK from
// the cluster store.
func ArchiveKEK(ctx context.Context, n *node.Node, req admin.ArchiveRequest) (admin.ArchivedKEK, error) {
	b, err := archiveOf(ctx, n, req)
	if err == nil {
		var u *keyring.UntrustedArchive
		if u, err = keyring.ParseArchive(b); err == nil {
			return admin.ArchivedKEK{KeyID: req.KeyID, Archive: b, Recipients: recipientsOf(u.Slots())}, nil
		}
	}
	if req.ForPrune {
		return admin.ArchivedKEK{}, fmt.Errorf("prune: %w", err)
	}
	return admin.ArchivedKEK{}, fmt.Errorf("archive: %w", err)
}

// ArchiveAlone is ArchiveKEK without a running serve.
func ArchiveAlone(ctx context.Context, n *node.Node, req admin.ArchiveRequest) (admin.ArchivedKEK, error) {
	if req.ForPrune {
		_, err := NotRunning(ctx, n, admin.PruneRequest{})
		return admin.ArchivedKEK{}, err
	}
	return ArchiveKEK(ctx, n, req)
}

func archiveOf(ctx context.Context, n *node.Node, req admin.ArchiveRequest) ([]byte, error) {
	k, err := n.Unlocker.Keyring()
	if err == nil && req.ForPrune {
		k, err = unused(ctx, n, req.KeyID, req.Records)
	}
	if err != nil {
		return nil, err
	}
	unknown := CheckRetired(k.Info(), req.KeyID)
	if unknown == nil {
		return makeArchive(ctx, n, k, req.KeyID)
	}
	if n.Archives == nil || k.CurrentID() == req.KeyID {
		return nil, unknown
	}
	b, err := n.Archives.Archive(ctx, string(req.KeyID))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, unknown
	}
	return b, err
}

// makeArchive wraps a retired KEK to the recipients of each recovery slot of the keyring.
func makeArchive(ctx context.Context, n *node.Node, k *keyring.Keyring, id seal.KeyID) ([]byte, error) {
	kek, err := keyring.RetiredKEK(k, id, n.Memory)
	if err != nil {
		return nil, err
	}
	defer kek.Close()
	var slots []seal.Slot
	for _, like := range k.Slots() {
		s, err := recovery.Rewrapper{Memory: n.Memory}.WrapLike(ctx, kek, like)
		if errors.Is(err, seal.ErrNotMine) {
			continue
		}
		if err != nil {
			return nil, err
		}
		slots = append(slots, s)
	}
	if len(slots) == 0 {
		return nil, errNoRecovery
	}
	return keyring.Archive(k, id, slots)
}

var errNoRecovery error = &seal.Error{
	Err:  errors.New("the keyring has no recovery slot, so that nobody could open an archive of the KEK; nothing was changed"),
	Hint: "run kleidi slot add recovery --recipient age1…",
}

// checkArchive returns an archive if a holder of one of k's KEKs made it from this KEK,
// for k's recovery recipients. Only kleidi makes archives, and it decrypts each one
// before it signs it. So the MAC proves everything that can be proven without the
// identity.
func checkArchive(k *keyring.Keyring, id seal.KeyID, archive []byte) (*keyring.UntrustedArchive, error) {
	u, err := keyring.ParseArchive(archive)
	if err != nil {
		return nil, err
	}
	if err := u.Verify(k); err != nil {
		return nil, err
	}
	switch {
	case u.Info().KeyID != id:
		return nil, fmt.Errorf("it is the archive of key ID %s", u.Info().KeyID)
	case !slices.Equal(recipientsOf(u.Slots()), recipientsOf(k.Slots())):
		return nil, errors.New("its recovery recipients differ from the keyring's")
	}
	return u, nil
}

// recipientsOf returns the recipients of the recovery slots among slots, sorted.
func recipientsOf(slots []seal.Slot) (all []string) {
	for _, s := range slots {
		if r, err := recovery.Recipients(s); err == nil {
			all = append(all, r...)
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// archiveInStore puts the archive into the cluster store, if there is one, and reads it
// back. An archive that an interrupted prune made there under the current KEK is as good.
func archiveInStore(ctx context.Context, n *node.Node, k *keyring.Keyring, req admin.PruneRequest) error {
	if n.Archives == nil || k.Info().Commit != keyring.CommitCluster {
		return nil
	}
	err := n.Archives.CreateArchive(ctx, string(req.KeyID), req.Archive)
	if err != nil && !errors.Is(err, store.ErrConflict) {
		return seal.WithHint(fmt.Errorf("%w; nothing was changed", err), "if this node has no right to do that, run kleidi cluster setup on it again")
	}
	b, err := n.Archives.Archive(ctx, string(req.KeyID))
	if err != nil {
		return fmt.Errorf("read it back: %w; nothing was changed", err)
	}
	u, err := checkArchive(k, req.KeyID, b)
	if err == nil && u.Info().By != k.CurrentID() { // who holds a former KEK alone may have made it
		err = fmt.Errorf("it was made under key ID %s, which is not the current one", u.Info().By)
	}
	if err != nil {
		return seal.WithHint(fmt.Errorf("KeyringArchive %s: %w; nothing was changed", req.KeyID, err), "keep a copy of that object, delete it, and run the command again")
	}
	return nil
}

// ImportArchive puts an archived KEK back into the keyring as a retired one.
func ImportArchive(ctx context.Context, n *node.Node, req admin.ImportArchiveRequest) (admin.KeyringState, error) {
	s, err := importArchive(ctx, n, req)
	if err != nil {
		err = fmt.Errorf("import-archive: %w", err)
	}
	return s, err
}

func importArchive(ctx context.Context, n *node.Node, req admin.ImportArchiveRequest) (admin.KeyringState, error) {
	k, err := n.Unlocker.Keyring()
	if err != nil {
		return admin.KeyringState{}, err
	}
	u, err := readArchive(ctx, n, req)
	if err != nil {
		return admin.KeyringState{}, err
	}
	id := u.Info().KeyID
	if k.Holds(id) {
		return n.Result(k.CurrentID(), fmt.Sprintf("the keyring holds key ID %s already", id))
	}
	if err := vouched(u, k, req.TrustKeyID); err != nil {
		return admin.KeyringState{}, err
	}
	kek, err := openArchive(ctx, n, u, req.Identity)
	if err != nil {
		return admin.KeyringState{}, err
	}
	defer kek.Close()
	if k.Info().Commit == keyring.CommitCluster && n.Replica != nil {
		err = n.Replica.Unarchive(ctx, func(now *keyring.Keyring) (*keyring.Keyring, error) { return keyring.Unarchive(now, u, kek) })
	} else {
		err = n.Unlocker.Change(ctx, func(now *keyring.Keyring) ([]*keyring.Keyring, error) {
			next, err := keyring.Unarchive(now, u, kek)
			return []*keyring.Keyring{next}, err
		})
	}
	return stateOf(n, k, err, fmt.Sprintf("the KEK %s is a retired one again: what is encrypted under it decrypts", id))
}

func readArchive(ctx context.Context, n *node.Node, req admin.ImportArchiveRequest) (*keyring.UntrustedArchive, error) {
	if len(req.Archive) > 0 {
		return keyring.ParseArchive(req.Archive)
	}
	if n.Archives == nil {
		return nil, seal.Errorf(seal.CauseConfiguration, "name the file of the archive", "this node has no access to the cluster store")
	}
	b, err := n.Archives.Archive(ctx, string(req.KeyID))
	if err != nil {
		return nil, seal.WithHint(err, "name the file of the archive")
	}
	u, err := keyring.ParseArchive(b)
	if err == nil && u.Info().KeyID != req.KeyID {
		err = fmt.Errorf("KeyringArchive %s is that of key ID %s", req.KeyID, u.Info().KeyID)
	}
	return u, err
}

// vouched refuses an archive unless a KEK of the keyring or the operator vouches that it
// belongs to this cluster: anybody can encrypt a KEK of their own to the recovery
// recipients.
func vouched(u *keyring.UntrustedArchive, k *keyring.Keyring, trusted seal.KeyID) error {
	id := u.Info().KeyID
	if trusted != "" && trusted != id {
		return seal.Errorf(seal.CauseAnchor, "compare it with what this cluster has used", "the archive is that of key ID %s, and --trust-key-id names %s", id, trusted)
	}
	err := u.Verify(k)
	if !errors.Is(err, keyring.ErrForeignArchive) {
		return err
	}
	if trusted == "" {
		return seal.Errorf(seal.CauseAnchor, "import the archive of that KEK first; or, if this cluster has used key ID "+string(id)+", name it in --trust-key-id", "%w: key ID %s", err, u.Info().By)
	}
	return nil
}

func openArchive(ctx context.Context, n *node.Node, u *keyring.UntrustedArchive, text []byte) (*seal.Secret, error) {
	identity, err := n.Memory.Take(text)
	if err != nil {
		return nil, err
	}
	defer identity.Close()
	opener, err := recovery.NewOpener(n.Memory, identity)
	if err != nil {
		return nil, err
	}
	for _, s := range u.Slots() {
		kek, err := opener.Unwrap(ctx, s)
		if !errors.Is(err, seal.ErrNotMine) {
			return kek, err
		}
	}
	return nil, seal.Errorf(seal.CauseNoSlot, "use the recovery identity of the time when the KEK was pruned", "the archive does not open with this identity")
}
