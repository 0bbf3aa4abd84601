package node

import (
	"context"

	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/tpm/nv"
)

// tpmAnchor keeps the anchor in the TPM. It implements unlock.Anchor.
type tpmAnchor struct{ *nv.AnchorStore }

// Load implements unlock.Anchor. It returns an anchor or an error.
func (p tpmAnchor) Load(ctx context.Context) (*keyring.Anchor, error) {
	b, err := p.AnchorStore.Load(ctx)
	if err != nil {
		return nil, err
	}
	anchor, err := keyring.AnchorOf(b)
	return &anchor, err
}

// Save implements unlock.Anchor.
func (p tpmAnchor) Save(ctx context.Context, anchor keyring.Anchor) error {
	b, err := anchor.Bytes()
	if err != nil {
		return err
	}
	return p.AnchorStore.Save(ctx, b)
}

// Replace implements unlock.Anchor.
func (p tpmAnchor) Replace(ctx context.Context, anchor keyring.Anchor) error {
	b, err := anchor.Bytes()
	if err != nil {
		return err
	}
	return p.AnchorStore.Replace(ctx, b)
}

// CheckAnchorable refuses an anchor in the TPM that another boot could write.
func (n *Node) CheckAnchorable(ctx context.Context) error {
	if n.Config.Anchor.Store != config.AnchorTPM {
		return nil
	}
	return n.Gate.Holds(ctx, "write the anchor in the TPM", n.Config.Anchor.PCRs, "bind the anchor to more with anchor.pcrs")
}
