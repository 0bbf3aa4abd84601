// Package prune removes a retired KEK from the keyring. The command line has the proof
// that nothing stored is under it (package usage), and has archived the keyring. This
// package checks what only the running serve knows, and makes the change. The order makes
// it safe: the archive is on disk and was read back before the keyring without the KEK
// is saved, so that an interruption leaves the KEK in one of the two.
package prune

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/unlock"
)

// Remove removes a retired KEK from the keyring of the running serve, if in this order:
// the keyring has one node; the KEK is a retired one; kube-apiserver's last Encrypt was
// under the current KEK; and the archive is a copy of this very keyring, which has a
// recovery slot.
func Remove(ctx context.Context, n *node.Node, req admin.PruneRequest) (admin.KeyringState, error) {
	if req.Check {
		return couldRemove(n, req)
	}
	var current seal.KeyID
	err := n.Unlocker.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		current = k.CurrentID()
		if err := check(k, unlock.LastEncrypted(n.Unlocker), req); err != nil {
			return nil, err
		}
		next, err := k.Prune(req.KeyID)
		if err != nil {
			return nil, err
		}
		return []*keyring.Keyring{next}, nil
	})
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("prune: %w", err)
	}
	return n.Result(current, fmt.Sprintf("the retired KEK %s is not in the keyring any more", req.KeyID))
}

// couldRemove says whether Remove would do its work. Once it would, kube-apiserver has
// moved on to the current KEK, and stores nothing under a former one any more.
func couldRemove(n *node.Node, req admin.PruneRequest) (admin.KeyringState, error) {
	k, err := n.Unlocker.Keyring()
	if err == nil {
		err = check(k, unlock.LastEncrypted(n.Unlocker), req)
	}
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("prune: %w", err)
	}
	return n.Result(k.CurrentID())
}

func check(k *keyring.Keyring, encrypted seal.KeyID, req admin.PruneRequest) error {
	sum := sha256.Sum256(k.Marshal())
	switch {
	case len(k.Nodes()) > 1:
		return fmt.Errorf("the keyring has %d nodes, and no version of kleidi prunes with more than one node yet; nothing was changed", len(k.Nodes()))
	case CheckRetired(k.Info(), req.KeyID) != nil:
		return CheckRetired(k.Info(), req.KeyID)
	case encrypted == "":
		return &seal.Error{
			Err:  errors.New("kube-apiserver has not encrypted anything since kleidi serve started, so nobody knows which KEK it uses; nothing was changed"),
			Hint: "restart kube-apiserver, and run the command again",
		}
	case encrypted != k.CurrentID():
		return &seal.Error{
			Err:  fmt.Errorf("kube-apiserver's last DEK seed is under %s, not under the current KEK; nothing was changed", encrypted),
			Hint: "wait three minutes after a rotation, or restart kube-apiserver; then run kleidi migrate",
		}
	case !hasRecovery(k.Slots()):
		return errNoRecovery
	case !bytes.Equal(sum[:], req.Archived):
		return &seal.Error{Err: errors.New("the archive is no copy of the keyring that kleidi serve holds open; nothing was changed"), Hint: "run the command again with another --archive"}
	}
	return nil
}

var errNoRecovery error = &seal.Error{
	Err:  errors.New("the keyring has no recovery slot, so that no archive of it would open on another machine; nothing was changed"),
	Hint: "run kleidi slot add recovery --recipient age1…",
}

// CheckRetired refuses a key ID that is not that of a retired KEK.
func CheckRetired(i keyring.Info, id seal.KeyID) error {
	if slices.ContainsFunc(i.Retired, func(r keyring.RetiredInfo) bool { return r.KeyID == id }) {
		return nil
	}
	return &seal.Error{Err: fmt.Errorf("key ID %s is not that of a retired KEK; nothing was changed", seal.OneLine(string(id), 100)), Hint: "kleidi status lists them"}
}

func hasRecovery(slots []seal.Slot) bool {
	return slices.ContainsFunc(slots, func(s seal.Slot) bool { return s.Type == seal.TypeRecovery })
}

// NotRunning is prune without a running serve, which alone knows what kube-apiserver
// encrypts under.
func NotRunning(context.Context, *node.Node, admin.PruneRequest) (admin.KeyringState, error) {
	return admin.KeyringState{}, errors.New("prune: kleidi serve does not run, and it alone knows under which KEK kube-apiserver encrypts; start it, and restart kube-apiserver")
}

// Archive writes a copy of a stored keyring that still holds the KEK, and reads it back.
// It returns the copy's digest. A file of the same bytes, which an interrupted prune has
// left, is as good; a copy that was broken off is never seen under its name.
func Archive(path string, stored []byte, id seal.KeyID) ([]byte, error) {
	_, err := os.Lstat(path)
	written := errors.Is(err, fs.ErrNotExist)
	if written {
		err = write(path, stored)
	}
	if err != nil {
		return nil, fmt.Errorf("archive: %w", err)
	}
	b, err := files.Read(path, keyring.MaxSize)
	if err != nil {
		return nil, fmt.Errorf("archive: read it back: %w", err)
	}
	switch {
	case !bytes.Equal(b, stored) && written:
		return nil, fmt.Errorf("archive: %s does not hold what was written to it; name another file with --archive", path)
	case !bytes.Equal(b, stored):
		return nil, fmt.Errorf("archive: %s exists, and is no copy of the present keyring; name another file with --archive", path)
	}
	u, err := keyring.Parse(b)
	if err != nil {
		return nil, fmt.Errorf("archive: %w", err)
	}
	if err := CheckRetired(u.Info(), id); err != nil {
		return nil, err
	}
	if !hasRecovery(u.Slots()) {
		return nil, errNoRecovery
	}
	sum := sha256.Sum256(b)
	return sum[:], nil
}

// write makes a file that appears under its name when it is whole, and is durable then.
func write(path string, b []byte) error {
	aside := path + ".new"
	if err := os.Remove(aside); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := files.WriteNew(aside, b); err != nil {
		return err
	}
	if err := os.Rename(aside, path); err != nil {
		return errors.Join(err, os.Remove(aside))
	}
	return files.SyncFolder(path)
}
