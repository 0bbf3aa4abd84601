package unlock

import (
	"context"
	"errors"
	"io/fs"

	"github.com/beezy-dev/kleidi/seal/keyring"
)

// FileAnchor keeps the anchor in a file beside the keyring. It stops an attacker who can
// write the keyring, through etcd for instance, but not one who can write the whole
// disk.
type FileAnchor struct{ Store Store }

// Load implements [Anchor].
func (p FileAnchor) Load(ctx context.Context) (*keyring.Anchor, error) {
	b, _, err := p.Store.Load(ctx)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, storeError("anchor", err)
	}
	anchor, err := keyring.ParseAnchor(b)
	if err != nil {
		return nil, err
	}
	return &anchor, nil
}

// Save implements [Anchor].
func (p FileAnchor) Save(ctx context.Context, anchor keyring.Anchor) error {
	_, version, err := p.Store.Load(ctx)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return storeError("anchor", err)
	}
	if _, err := p.Store.Save(ctx, anchor.Marshal(), version); err != nil {
		return storeError("anchor", err)
	}
	return nil
}

// Replace implements [Anchor].
func (p FileAnchor) Replace(ctx context.Context, anchor keyring.Anchor) error {
	return p.Save(ctx, anchor)
}
