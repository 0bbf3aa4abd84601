package unlock

import (
	"context"

	"github.com/beezy-dev/kleidi/seal/keyring"
)

// Follow takes a shared keyring, which another node has changed, in the place of the
// open one where [keyring.Follows] allows it, and saves and announces it as Change
// does. The KEK is in memory: no gate is asked and no slot is opened.
func (u *Unlocker) Follow(ctx context.Context, remote *keyring.Untrusted) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	k, err := u.Keyring()
	if err != nil {
		return err
	}
	next, err := k.Follow(remote)
	if err != nil {
		return err
	}
	return u.commit(ctx, []*keyring.Keyring{next}, Opener{}, u.anchor)
}

// OpenStaged opens the staged KEK of the open keyring, through the gate and with a
// slot. Nothing is done where it is open or none is staged. A failure is in State too,
// and the node goes on serving.
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
