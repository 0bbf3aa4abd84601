package founding

import (
	"context"
	"crypto/rand"
	"errors"
	"io/fs"
	"os"
	"slices"
	"time"

	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/reseal"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/rotation"
)

// firstKeyring makes the KEK, its slots and the keyring.
func firstKeyring(ctx context.Context, n *node.Node, opts InitOptions) (*InitResult, error) {
	kek, err := n.Memory.NewKEK()
	if err != nil {
		return nil, err
	}
	defer kek.Close() // harmless once the keyring, which takes the KEK, has closed it
	ek, slots, err := firstSlots(ctx, n, kek, opts)
	if err != nil {
		return nil, err
	}
	if err := rotation.Prove(ctx, kek, slots, n.Wrappers()); err != nil {
		return nil, err
	}
	if !opts.NoRecovery {
		recoverySlot, err := makeRecovery(ctx, n, kek, opts)
		if err != nil {
			return nil, err
		}
		slots = append(slots, recoverySlot)
	}
	if opts.Import != nil { // only now: an operator who gives up earlier leaves nothing behind
		if err := opts.Import.keepPIN(); err != nil {
			return nil, err
		}
	}
	return saveFirst(ctx, n, kek, slots, ek, opts)
}

// firstSlots wraps the KEK by every wrapper that may open the keyring at start.
func firstSlots(ctx context.Context, n *node.Node, kek *seal.Secret, opts InitOptions) (ek string, slots []seal.Slot, err error) {
	order := slices.Clone(n.Config.Unlock.Order)
	if opts.Import != nil && !opts.Import.Opens(order) {
		order = append(order, seal.TypePKCS11)
	}
	for _, kind := range order {
		var slot seal.Slot
		if kind == seal.TypeTPM || slotview.Second(kind) != "" {
			ek, slot, err = firstTPM(ctx, n, kek, opts)
		} else {
			opts.Progress("wrapping a fresh KEK by " + kind)
			slot, err = n.Wrapper(kind).Wrap(ctx, kek)
		}
		if err != nil {
			return "", nil, err
		}
		slots = append(slots, slot)
	}
	if !n.View.OpensWithTPM() && n.Attests() {
		err = n.Gate.Attest(ctx, nil)
	}
	return ek, slots, err
}

// firstKey makes the token generate the key with which it wraps.
func firstKey(ctx context.Context, n *node.Node, opts InitOptions) error {
	if n.HSM == nil || opts.Import != nil || !slices.ContainsFunc(n.Config.Unlock.Order, func(kind string) bool { return kind == seal.TypePKCS11 || slotview.Second(kind) == seal.TypePKCS11 }) {
		return errors.New("--generate-key is for a token that is configured, and that unlock.order names; set both, or run kleidi slot add pkcs11 --generate-key once the keyring is made")
	}
	opts.Progress("having the token make its key")
	_, err := n.HSM.GenerateKey(ctx)
	return err
}

// firstTPM seals the KEK to the running boot.
func firstTPM(ctx context.Context, n *node.Node, kek *seal.Secret, opts InitOptions) (ek string, slot seal.Slot, err error) {
	opts.Progress("looking for the TPM at " + n.Config.TPM.Device)
	if ek, err = n.TPM.Provision(ctx); err != nil {
		return "", slot, err
	}
	if err := firstPolicy(ctx, n, opts); err != nil {
		return "", slot, err
	}
	opts.Progress("attesting this boot, and sealing a fresh KEK to it")
	state, err := n.Gate.State(ctx)
	if err != nil {
		return "", slot, err
	}
	if slot, err = reseal.SealState(ctx, n, n.TPM, kek, state); err != nil {
		return "", slot, err
	}
	return ek, slot, n.CheckAnchorable(ctx)
}

// firstPolicy records the running boot as the boot policy, if the configuration names a
// file that does not exist yet.
func firstPolicy(ctx context.Context, n *node.Node, opts InitOptions) error {
	path := n.Config.TPM.BootPolicy
	if path == "" {
		return nil
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	p, err := reseal.RecordPolicy(ctx, n, nil)
	if err != nil {
		return err
	}
	opts.Progress("recording this boot as the boot policy " + path)
	return files.WriteNew(path, p.Marshal())
}

func saveFirst(ctx context.Context, n *node.Node, kek *seal.Secret, slots []seal.Slot, ek string, opts InitOptions) (*InitResult, error) {
	var cluster seal.ClusterID
	rand.Read(cluster[:])
	k, err := keyring.New(cluster, kek, slots, []keyring.Node{{Name: n.Config.Node, EK: ek}}, time.Now())
	if err != nil {
		return nil, err
	}
	defer k.Close()
	opts.Progress("saving the keyring to " + n.Config.Keyring())
	if err := n.Anchor.Replace(ctx, k.Anchor()); err != nil {
		return nil, err
	}
	if err := n.Slots.Begin(ctx, k); err != nil {
		return nil, err
	}
	if _, err := n.Keyring.Save(ctx, k.Marshal(), ""); err != nil {
		return nil, err
	}
	r := &InitResult{ClusterID: cluster, KeyID: k.CurrentID(), Keyring: n.Config.Keyring(), Node: n.Config.Node, EK: ek}
	if opts.Import != nil {
		r.PKCS11 = &TokenSettings{opts.Import.Token.Module, opts.Import.Token.URI, opts.Import.Token.PINFile}
	}
	for _, s := range slots {
		r.Slots = append(r.Slots, s.Type+": "+n.View.Binding(s))
	}
	return r, nil
}
