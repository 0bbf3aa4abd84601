package unlock

import (
	"context"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// Follow replaces the open keyring with a shared keyring that another node has changed,
// if [keyring.Keyring.Follow] allows it on machine. It saves and announces as Change does.
// The KEK is in memory, so Follow neither passes the gate nor opens a slot.
func (u *Unlocker) Follow(ctx context.Context, remote *keyring.Untrusted, machine *keyring.Node) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	k, err := u.Keyring()
	if err != nil {
		return err
	}
	next, err := k.Follow(remote, machine)
	if err != nil {
		return err
	}
	return u.commit(ctx, SlotChange{Before: k, Elsewhere: true}, []*keyring.Keyring{next}, Opener{}, u.anchor, notInCluster)
}

// OpenStaged opens the staged KEK of the open keyring, through the gate and with a slot.
// It does nothing if that KEK is open or if no KEK is staged. If it fails, State shows
// the error too, and the node serves as before.
func (u *Unlocker) OpenStaged(ctx context.Context) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	k, err := u.Keyring()
	if err != nil {
		return err
	}
	if id := k.StagedID(); id == "" || k.Holds(id) {
		return nil
	}
	gate, err := u.attest(ctx, k.StagedSlots())
	if err != nil {
		return err
	}
	next, problem := u.openStaged(ctx, k, gate)
	if problem == nil {
		u.announce(next, Opener{}, Timing{})
		return nil
	}
	s := u.State()
	s.Staged = problem
	u.state.Store(&s)
	return problem
}

// OpenFork opens another keyring of this cluster, with a KEK that the open keyring holds
// or else with a slot. It also opens the staged KEK of that keyring, if it can. The
// caller closes the keyring.
func OpenFork(ctx context.Context, u *Unlocker, mem seal.Memory, remote *keyring.Untrusted) (*keyring.Keyring, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	k, err := u.Keyring()
	if err != nil {
		return nil, err
	}
	other, err := keyring.OpenHeld(k, remote, mem)
	if err != nil {
		if slotted, _, slotErr := u.openWith(ctx, remote, nil, &Timing{}); slotErr == nil {
			return slotted, nil
		}
		return nil, err
	}
	gate, err := u.attest(ctx, remote.StagedSlots())
	if err != nil {
		other.Close()
		return nil, err
	}
	other, _ = u.openStaged(ctx, other, gate)
	return other, nil
}

// Resolve replaces the open keyring with the result of f, because an operator says so.
// commit puts the result into the cluster store first; nil means that another node made
// the result.
func Resolve(ctx context.Context, u *Unlocker, f func(*keyring.Keyring) (*keyring.Keyring, error), commit func(context.Context, *keyring.Keyring) error) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	k, err := u.Keyring()
	if err != nil {
		return err
	}
	next, err := f(k)
	if err != nil {
		return err
	}
	cluster := notInCluster
	if commit != nil {
		cluster = func(ctx context.Context, _, next *keyring.Keyring) error { return commit(ctx, next) }
	}
	return u.commit(ctx, SlotChange{Before: k, Elsewhere: commit == nil}, []*keyring.Keyring{next}, Opener{}, u.anchor, cluster)
}
