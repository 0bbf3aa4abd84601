package lifecycle

import (
	"context"
	"errors"
	"fmt"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/store"
)

// Save writes the open keyring back.
func Save(ctx context.Context, n *node.Node, _ admin.SaveRequest) (admin.KeyringState, error) {
	if err := store.PrepareDir(n.Config.State.Dir); err != nil { // the folder may be lost with the keyring
		return admin.KeyringState{}, fmt.Errorf("save: %w", err)
	}
	if err := n.Unlocker.Save(ctx); err != nil {
		return admin.KeyringState{}, fmt.Errorf("save: %w", err)
	}
	id, err := n.Unlocker.CurrentID()
	if err != nil {
		return admin.KeyringState{}, err
	}
	return n.Result(id, "the open keyring is stored again; what it replaced, if it could be read, is the previous revision")
}

// ReadStored reads a keyring file for display. Nothing has authenticated it.
func ReadStored(ctx context.Context, cfg *config.Config) (*keyring.Untrusted, []byte, error) {
	b, _, err := store.NewFile(cfg.Keyring()).Load(ctx)
	if err != nil {
		return nil, nil, files.HintRoot(node.KeyringMissing(err))
	}
	u, err := keyring.Parse(b)
	return u, b, err
}

// ReadBackup reads a file to restore the keyring from. Nothing has authenticated it.
func ReadBackup(file string) ([]byte, error) {
	b, err := files.Read(file, keyring.MaxSize)
	if err != nil {
		return nil, err
	}
	if _, err := keyring.Parse(b); err != nil && !errors.Is(err, keyring.ErrNewerFormat) {
		return nil, fmt.Errorf("%s: %w", file, seal.WithHint(err, "name a file that kleidi keyring backup wrote, or give --previous"))
	}
	return b, nil
}

// ReadPrevious reads the previous revision, which the store of files keeps.
func ReadPrevious(ctx context.Context, cfg *config.Config) ([]byte, error) {
	b, err := store.NewFile(cfg.Keyring()).Previous(ctx)
	if err != nil {
		return nil, fmt.Errorf("there is no previous revision: %w", files.HintRoot(err))
	}
	return b, nil
}

// Verify proves the stored keyring: a slot opens, the MAC verifies and the anchor
// agrees. It changes nothing.
func Verify(ctx context.Context, n *node.Node, _ admin.VerifyRequest) (admin.KeyringState, error) {
	k, err := n.Unlocker.Open(ctx)
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("verify: %w", err)
	}
	defer k.Close()
	return admin.KeyringState{CurrentKeyID: k.CurrentID(), Revision: k.Revision(), Changes: []string{
		"the stored keyring opens, its MAC verifies and the anchor agrees",
		"opened: " + seal.Count(len(k.Info().Retired), "retired KEK"),
	}}, nil
}

// Reload makes serve read the keyring again.
func Reload(ctx context.Context, n *node.Node, _ admin.ReloadRequest) (admin.KeyringState, error) {
	if err := n.Unlocker.Unlock(ctx); err != nil {
		return admin.KeyringState{}, err
	}
	k, err := n.Unlocker.CurrentID()
	if err != nil {
		return admin.KeyringState{}, err
	}
	return n.Result(k, "the keyring was read again")
}

// NothingToSave replaces Save without a running serve, because no process holds a keyring
// open.
func NothingToSave(context.Context, *node.Node, admin.SaveRequest) (admin.KeyringState, error) {
	return admin.KeyringState{}, errors.New("kleidi serve does not run, so nothing holds a keyring open; to bring one back, run kleidi keyring restore --previous, or kleidi keyring restore BACKUP")
}
