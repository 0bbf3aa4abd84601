package rotation

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// Cluster is the cluster as the driver's node sees it.
type Cluster interface {
	// Keyring returns the open keyring of this node, which must be in step with the
	// cluster store.
	Keyring(context.Context) (*keyring.Keyring, error)
	// Records returns the records of k's nodes that verify and count.
	Records(ctx context.Context, k *keyring.Keyring) ([]*keyring.VerifiedRecord, error)
	// Change makes revisions of the shared keyring; see unlock.Unlocker.
	Change(ctx context.Context, f func(*keyring.Keyring) ([]*keyring.Keyring, error)) error
}

// Driver drives a rotation over several nodes, from any one of them. It keeps no state:
// after a crash, or on another node, the next call continues from the content of the
// cluster store.
type Driver struct {
	Cluster Cluster
	Memory  seal.Memory
	// Wrap wraps a fresh KEK in shared slots, and in import slots for the boot states
	// in the records of all nodes, including this one. If this node crashes or the
	// store's answer is lost, it must open the KEK from the store's content.
	Wrap func(ctx context.Context, k *keyring.Keyring, kek *seal.Secret, records []*keyring.VerifiedRecord) ([]seal.Slot, error)
}

// Advance takes the next step of a rotation that replaces the KEK with this key ID, and
// returns the step. If the step is to wait, it does nothing.
func (d *Driver) Advance(ctx context.Context, replace seal.KeyID) (Step, error) {
	k, err := d.Cluster.Keyring(ctx)
	if err != nil {
		return Step{}, err
	}
	records, err := d.Cluster.Records(ctx, k)
	if err != nil {
		return Step{}, err
	}
	s := Next(k, replace, records)
	revision := k.Revision()
	switch s.Do {
	case Stage:
		err = d.change(ctx, revision, func(k *keyring.Keyring) (*keyring.Keyring, error) { return d.stage(ctx, k, records) })
	case Activate:
		err = d.change(ctx, revision, func(k *keyring.Keyring) (*keyring.Keyring, error) { return k.Activate(time.Now()) })
	}
	return s, err
}

// Abort retires the staged KEK. Nobody may have activated it.
func (d *Driver) Abort(ctx context.Context) error {
	k, err := d.Cluster.Keyring(ctx)
	if err != nil {
		return err
	}
	return d.change(ctx, k.Revision(), func(k *keyring.Keyring) (*keyring.Keyring, error) { return k.Abort(time.Now()) })
}

// change makes the revision that directly follows the judged one.
func (d *Driver) change(ctx context.Context, judged uint64, f func(*keyring.Keyring) (*keyring.Keyring, error)) error {
	return d.Cluster.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		if k.Revision() != judged {
			return nil, errors.New("the keyring has changed meanwhile; run the command again")
		}
		next, err := f(k)
		if err != nil {
			return nil, err
		}
		return []*keyring.Keyring{next}, nil
	})
}

func (d *Driver) stage(ctx context.Context, k *keyring.Keyring, records []*keyring.VerifiedRecord) (*keyring.Keyring, error) {
	if !k.HasRoom() {
		return nil, seal.Errorf(seal.CauseStore, "remove a retired KEK with kleidi prune KEYID; until then the keyring goes on serving", "the keyring holds %d retired KEKs, and no more fit", keyring.MaxRetired)
	}
	kek, err := d.Memory.NewKEK()
	if err != nil {
		return nil, err
	}
	slots, err := d.Wrap(ctx, k, kek, records)
	if err != nil {
		kek.Close()
		return nil, fmt.Errorf("wrap the new KEK: %w", err)
	}
	staged, err := k.Stage(kek, slots, time.Now())
	if err != nil {
		kek.Close()
	}
	return staged, err
}
