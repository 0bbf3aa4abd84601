package replica_test

import (
	"testing"
	"testing/synctest"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/replica"
)

// own returns a node's report of itself, from memory.
func own(n *node) (r replica.Report) {
	for _, r := range n.Replica.State().Reports {
		if r.Node == n.name {
			return r
		}
	}
	return r
}

// TestOwnRecordIsKnown: a node that has followed knows its own record at once. The clock
// stands still, so it does not read the records of all nodes again.
func TestOwnRecordIsKnown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := open(t)
		n := c.nodes[1]
		must(t, c.nodes[0].change())
		read := n.Replica.State().ReportsRead
		must(t, n.Sync(ctx))
		s, revision := n.Replica.State(), n.keyring().Revision()
		if r := own(n); !s.ReportsRead.Equal(read) || !r.Counts || r.Record.Revision != revision {
			t.Errorf("at revision %d the node reports of itself %+v, read %s", revision, r, s.ReportsRead.Sub(read))
		}
		if r := own(c.nodes[0]); r.Counts && r.Record.Revision == revision {
			t.Error("the node that made the change has not made a round, and knows its record")
		}
	})
}

// TestOwnRecordDeleted: a node writes its record again after somebody deleted it. A node that
// lacks the right to says so, in step as it is, until an administrator has made the object.
func TestOwnRecordDeleted(t *testing.T) {
	c := open(t)
	n := c.nodes[0]
	c.store.DeleteRecord(n.name)
	must(t, n.Sync(ctx))
	if all, err := c.store.Records(ctx, n.name); err != nil || len(all) != 1 || !own(n).Counts {
		t.Fatalf("the node has not written its record again: %v, %v", all, err)
	}

	refusal := seal.Errorf(seal.CauseCredentials, "run cluster setup", "there is no such object")
	c.store.RefuseRecords(refusal)
	c.store.DeleteRecord(n.name)
	for range 2 {
		if err := n.Sync(ctx); seal.CauseOf(err) != seal.CauseCredentials {
			t.Errorf("a round without the right to make a record: %v", err)
		}
		if s := n.Replica.State(); seal.CauseOf(s.Problem) != seal.CauseCredentials || !s.InStep || own(n).Record != nil {
			t.Errorf("the node says %+v", s)
		}
	}
	if _, _, err := n.Encrypt([]byte("seed")); err != nil {
		t.Errorf("the node no longer encrypts: %v", err)
	}
	c.store.RefuseRecords(nil)
	must(t, n.Sync(ctx))
	if s := n.Replica.State(); s.Problem != nil || !own(n).Counts {
		t.Errorf("after an administrator made the object: %+v", s)
	}
}
