package replica_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// pruned returns a cluster that has pruned its first KEK, which is kept as an archive; and
// what restores the store to a time before the rotation.
func pruned(t *testing.T) (c *cluster, former seal.KeyID, unarchive func(*keyring.Keyring) (*keyring.Keyring, error), restore func()) {
	t.Helper()
	c = open(t)
	n := c.nodes[0]
	former = n.keyring().CurrentID()
	kek := copied(t, n.keyring().KEK())
	t.Cleanup(func() { kek.Close() })
	restore = c.store.Snapshot()
	c.rotate(t, 0)
	b, err := keyring.Archive(n.keyring(), former, []seal.Slot{{Type: seal.TypeRecovery, Data: []byte("{}")}})
	must(t, err)
	u, err := keyring.ParseArchive(b)
	must(t, err)
	must(t, n.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		next, err := k.Prune(former)
		return []*keyring.Keyring{next}, err
	}))
	c.settle(t)
	return c, former, func(k *keyring.Keyring) (*keyring.Keyring, error) { return keyring.Unarchive(k, u, kek) }, restore
}

// TestUnarchive: the KEK is back on this node and in the store, from which the others take
// it: in the place of the present keyring, of none, and of one from before the rotation, which
// no node could follow.
func TestUnarchive(t *testing.T) {
	for what, prepare := range map[string]func(c *cluster, restore func()){
		"the present keyring": func(*cluster, func()) {},
		"no keyring":          func(c *cluster, _ func()) { c.store.Write(nil) },
		"a restored store":    func(_ *cluster, restore func()) { restore() },
	} {
		c, former, unarchive, restore := pruned(t)
		prepare(c, restore)
		n := c.nodes[1]
		current, revision := n.keyring().CurrentID(), n.keyring().Revision()
		must(t, n.Unarchive(ctx, unarchive))
		there, err := c.store.Load(ctx)
		must(t, err)
		if k := n.keyring(); !k.Holds(former) || k.CurrentID() != current || k.Revision() <= revision || string(there) != string(k.Shared()) {
			t.Errorf("%s: %+v", what, k.Info())
		}
		c.settle(t)
		for _, n := range c.nodes {
			n.start()
			if !n.keyring().Holds(former) || n.keyring().CurrentID() != current {
				t.Errorf("%s: node %s: %+v", what, n.name, n.keyring().Info())
			}
		}
	}
}

// TestUnarchiveRefused: neither the node nor the store changes, and the node goes on with
// its own keyring.
func TestUnarchiveRefused(t *testing.T) {
	refusal := errors.New("there is no such archive")
	for what, row := range map[string]struct {
		prepare func(*cluster)
		fails   error
		cause   seal.Cause
		says    string
	}{
		"the store is down":                            {func(c *cluster) { c.store.SetDown(errDown) }, nil, seal.CauseUnavailable, "the API is down"},
		"it is no archive":                             {func(*cluster) {}, refusal, "", refusal.Error()},
		"the store has garbage":                        {func(c *cluster) { c.store.Write([]byte("{}\n")) }, nil, "", "the cluster store: "},
		"the store has a KEK that nobody acknowledged": {func(c *cluster) { c.store.Write(evil(t, c.nodes[2].keyring())) }, nil, "", "the cluster store: "},
	} {
		c, former, unarchive, _ := pruned(t)
		row.prepare(c)
		n := c.nodes[1]
		before, file := string(n.keyring().Shared()), string(n.file.b)
		err := n.Unarchive(ctx, func(k *keyring.Keyring) (*keyring.Keyring, error) {
			if row.fails != nil {
				return nil, row.fails
			}
			return unarchive(k)
		})
		if err == nil || !strings.Contains(err.Error(), row.says) || row.cause != "" && seal.CauseOf(err) != row.cause {
			t.Errorf("%s: %v", what, err)
		}
		if k := n.keyring(); k.Holds(former) || string(k.Shared()) != before || string(n.file.b) != file {
			t.Errorf("%s: the keyring has changed: %+v", what, k.Info())
		}
		if _, _, err := n.Encrypt([]byte("seed")); err != nil {
			t.Errorf("%s: the node no longer encrypts: %v", what, err)
		}
	}
}
