package prune

import (
	"context"
	"fmt"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/carry"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/usage"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// ReadRecords reads the records of other nodes from their exports.
func ReadRecords(exports []string) (records [][]byte, err error) {
	for _, path := range exports {
		b, err := files.Read(path, carry.MaxFile)
		if err != nil {
			return nil, fmt.Errorf("prune: %w", err)
		}
		f, err := carry.ParseFile(b)
		if err != nil {
			return nil, fmt.Errorf("prune: %s: %w", path, err)
		}
		records = append(records, f.Record)
	}
	return records, nil
}

// FindArchives notes, for each KEK that the keyring does not hold, where its archive is.
// It looks in the named files and, with a configuration, in the state folder and the
// cluster store.
func FindArchives(ctx context.Context, cfg *config.Config, ids []usage.KeyIDUse, named []string) error {
	found := map[string]string{}
	for _, path := range named {
		id, err := archivedID(path)
		if err != nil {
			return files.HintRoot(err)
		}
		found[string(id)] = path
	}
	for i := range ids {
		k := &ids[i]
		if k.Role != "" {
			continue
		}
		if k.Archive = found[k.KeyID]; k.Archive != "" || cfg == nil {
			continue
		}
		path := cfg.ArchivePath(seal.KeyID(k.KeyID))
		if id, err := archivedID(path); err == nil && string(id) == k.KeyID {
			k.Archive = path
		} else if storeKeeps(ctx, cfg, seal.KeyID(k.KeyID)) {
			k.Archive = k.KeyID
		}
	}
	return nil
}

// archivedID returns the key ID of the KEK that a file claims to archive.
func archivedID(path string) (seal.KeyID, error) {
	b, err := files.Read(path, keyring.MaxArchiveSize)
	if err != nil {
		return "", err
	}
	u, err := keyring.ParseArchive(b)
	if err != nil {
		return "", fmt.Errorf("%s: %w", path, err)
	}
	return u.Info().KeyID, nil
}

// storeKeeps asks the running serve whether the cluster store keeps the archive of a KEK.
func storeKeeps(ctx context.Context, cfg *config.Config, id seal.KeyID) bool {
	client, err := admin.Dial(ctx, cfg.Admin.Socket)
	if err != nil {
		return false
	}
	_, err = admin.Call(ctx, client, admin.ArchiveKEK, admin.ArchiveRequest{KeyID: id})
	return err == nil
}
