package replica_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/rotation"
)

// stage has the first node stage a KEK.
func (c *cluster) stage(t *testing.T) {
	t.Helper()
	a := c.nodes[0]
	if s, err := a.driver().Advance(ctx, a.keyring().CurrentID()); err != nil || s.Do != rotation.Stage {
		t.Fatal(s, err)
	}
	must(t, a.Sync(ctx))
}

// TestWrapperAway: a node that can't open the staged KEK, because its wrapper does not answer,
// tells the others so. The cluster store is not what is away.
func TestWrapperAway(t *testing.T) {
	c := open(t)
	a, b := c.nodes[0], c.nodes[1]
	b.wrapper.err = seal.Errorf(seal.CauseUnavailable, "start the vault", "vault: connection refused")
	c.stage(t)
	if err := b.Sync(ctx); seal.CauseOf(err) != seal.CauseUnavailable || !strings.Contains(err.Error(), "kleidi rotate --abort on a node where that KEK is open") {
		t.Errorf("%v", err)
	}
	if s := b.Replica.State(); s.Away || s.Reached.IsZero() {
		t.Errorf("%+v", s)
	}
	reports, err := a.Reports(ctx)
	must(t, err)
	if r := reports[1]; !r.Counts || !strings.Contains(r.Record.Problem, "connection refused") {
		t.Errorf("%+v", r)
	}
	c.store.SetDown(errDown)
	if err := b.Sync(ctx); seal.CauseOf(err) != seal.CauseUnavailable || !b.Replica.State().Away {
		t.Errorf("%v, %+v", err, b.Replica.State())
	}
}

// TestPublishTakesNothingBack: a node that lags behind an activation does not replace the
// activated keyring with its own.
func TestPublishTakesNothingBack(t *testing.T) {
	c := open(t)
	a, b := c.nodes[0], c.nodes[1]
	former := a.keyring().CurrentID()
	c.stage(t)
	c.settle(t)
	b.fails = errors.New("the TPM is locked out")
	must(t, b.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		next, err := k.WithOwnSlots(k.OwnSlots(), nil)
		return []*keyring.Keyring{next}, err
	}))
	if s, err := a.driver().Advance(ctx, former); err != nil || s.Do != rotation.Activate {
		t.Fatal(s, err)
	}
	must(t, a.Sync(ctx))
	if err := b.Sync(ctx); err == nil {
		t.Error("the node follows without a slot of its own")
	}
	if err := b.Publish(ctx, seal.Memory{}, false); err == nil || !strings.Contains(err.Error(), "holds a newer keyring") {
		t.Errorf("%v", err)
	}
	must(t, a.Sync(ctx))
	b.fails = nil
	must(t, b.Sync(ctx))
	if id := b.keyring().CurrentID(); id == former || id != a.keyring().CurrentID() {
		t.Errorf("the current KEK is %s", id)
	}
}
