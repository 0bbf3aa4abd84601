package founding

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/nv"
)

// Init makes the keyring. Until its last step only the TPM's epoch counter exists, and
// a second init continues from there. Init saves the anchor first: a keyring without an
// anchor would not be trusted, and an anchor without a keyring means nothing.
func Init(ctx context.Context, n *node.Node, opts InitOptions) (*InitResult, error) {
	if opts.Progress == nil {
		opts.Progress = func(string) {}
	}
	if opts.Import != nil {
		if err := useToken(n, opts.Import); err != nil {
			return nil, err
		}
	}
	if n.Remote != nil {
		return nil, errors.New("tpm.verifier is set, and no verifier knows this cluster yet; leave it out, and set it once the verifier has registered this node, see docs/remote-attestation.md")
	}
	if !opts.NoRecovery && !opts.BreakTwoOfTwo {
		if err := n.View.CheckAdd(seal.TypeRecovery, nil); err != nil {
			return nil, err
		}
	}
	if err := n.AcquireState(); err != nil {
		if _, _, missing := n.Keyring.Load(ctx); missing == nil { // the running serve has it
			err = cmp.Or(checkVacant(ctx, n), err)
		}
		return nil, err
	}
	if err := checkVacant(ctx, n); err != nil {
		return nil, err
	}
	n.WarnTPM()
	n.WarnOwner(ctx)
	if !opts.GenerateKey {
		return firstKeyring(ctx, n, opts)
	}
	if err := firstKey(ctx, n, opts); err != nil {
		return nil, err
	}
	r, err := firstKeyring(ctx, n, opts)
	if err != nil {
		err = node.HintKeyMade(err)
	}
	return r, err
}

// checkVacant refuses to make a keyring if one exists or existed: the previous revision
// may be the only trace of it.
func checkVacant(ctx context.Context, n *node.Node) error {
	_, _, err := n.Keyring.Load(ctx)
	if err == nil {
		return fmt.Errorf("%s exists, and init never replaces a keyring; see kleidi status, or move the folder %s away if this is to be a new cluster", n.Config.Keyring(), n.Config.State.Dir)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	anchor, err := n.Anchor.Load(ctx)
	if errors.Is(err, nv.ErrAnchorMissing) || errors.Is(err, nv.ErrAnchorUnwritten) {
		err = nil
	}
	if errors.Is(err, nv.ErrAnchorReplaced) {
		return fmt.Errorf("%w; or, if this is to be a new cluster: tpm2_nvundefine %#x", err, n.Config.Anchor.Index)
	}
	if err != nil {
		return err
	}
	// An init that was killed may also leave an anchor of the first revision.
	if _, err = n.Keyring.Previous(ctx); errors.Is(err, fs.ErrNotExist) && (anchor == nil || anchor.Revision == 1) {
		return nil
	}
	return fmt.Errorf("%s is gone, and its previous revision or its anchor is still there; run kleidi keyring restore --previous, or move the folder %s away if this is to be a new cluster", n.Config.Keyring(), n.Config.State.Dir)
}
