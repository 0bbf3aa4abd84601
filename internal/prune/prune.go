// Package prune removes a retired KEK from the keyring. The command line has already
// proved that no stored object is under that KEK (package usage), and has kept an archive
// of it. This package makes the archive, checks the facts that only the running serve
// knows, and makes the change. The order makes it safe: the archive is on disk and was
// read back before the keyring without the KEK is saved, so that after an interruption
// the KEK is in at least one of the two.
package prune

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// Remove removes a retired KEK from the keyring of the running serve, if in this order:
// the KEK is retired, and no rotation is going on; every node has reported that its
// kube-apiserver's last Encrypt was under the current KEK; the archive holds this KEK,
// for the keyring's recovery recipients; and the cluster store, if there is one, also
// holds an archive. The other nodes follow the new keyring like any other.
func Remove(ctx context.Context, n *node.Node, req admin.PruneRequest) (admin.KeyringState, error) {
	s, err := remove(ctx, n, req)
	if err != nil {
		err = fmt.Errorf("prune: %w", err)
	}
	return s, err
}

func remove(ctx context.Context, n *node.Node, req admin.PruneRequest) (admin.KeyringState, error) {
	k, err := unused(ctx, n, req.KeyID, req.Records)
	if err == nil {
		err = check(k, req)
	}
	if err == nil && !req.Check {
		err = archiveInStore(ctx, n, k, req)
	}
	if err != nil || req.Check {
		return stateOf(n, k, err)
	}
	err = n.Unlocker.Change(ctx, func(now *keyring.Keyring) ([]*keyring.Keyring, error) {
		if now.Revision() != k.Revision() || now.CurrentID() != k.CurrentID() {
			return nil, errors.New("the keyring has changed meanwhile; nothing was changed; run the command again")
		}
		next, err := now.Prune(req.KeyID)
		return []*keyring.Keyring{next}, err
	})
	return stateOf(n, k, err, fmt.Sprintf("the retired KEK %s is no longer in the keyring", req.KeyID))
}

// check refuses unless the request has an archive of the KEK that this keyring made since
// its last rotation, for the present recovery recipients.
func check(k *keyring.Keyring, req admin.PruneRequest) error {
	u, err := checkArchive(k, req.KeyID, req.Archive)
	if err == nil && u.Info().By != k.CurrentID() {
		err = errors.New("it was made before the last rotation")
	}
	if err != nil {
		return &seal.Error{Err: fmt.Errorf("this is no archive of the KEK: %w; nothing was changed", err), Hint: "run the command again with another --archive"}
	}
	return nil
}

// Keep writes an archive to a file, and returns what it reads back. If the file exists,
// because an interrupted prune may have left it, Keep returns its content: the running
// serve decides whether it is an archive of the KEK. A partly written file never appears
// under its name.
func Keep(path string, archive []byte) ([]byte, error) {
	_, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		err = write(path, archive)
	}
	if err != nil {
		return nil, fmt.Errorf("archive: %w", err)
	}
	b, err := files.Read(path, keyring.MaxArchiveSize)
	if err != nil {
		return nil, fmt.Errorf("archive: read it back: %w", err)
	}
	return b, nil
}

// write makes a file that appears under its name only when it is complete and durable.
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
