package replica_test

import (
	"bytes"
	"fmt"
	"runtime"
	"testing"

	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/rotation"
	"github.com/beezy-dev/kleidi/seal/store"
)

// TestStoreWriter: whoever can write the store deletes all records, deletes the Keyring, or
// floods the store with records, at each phase of a rotation. Every node goes on opening
// and decrypting, also after a restart; the rotation waits for the nodes by name, and ends
// once the intruder is gone.
func TestStoreWriter(t *testing.T) {
	for name, attack := range map[string]func(c *cluster){
		"deletes the records": func(c *cluster) {
			for _, n := range c.nodes {
				c.store.DeleteRecord(n.name)
			}
		},
		"deletes the Keyring": func(c *cluster) { c.store.Write(nil) },
		"floods with records": func(c *cluster) {
			for i := range 3000 {
				_ = c.store.PutRecord(ctx, fmt.Sprintf("stranger-%d", i), []byte("{}\n"))
			}
		},
		"writes large records": func(c *cluster) {
			for _, n := range c.nodes {
				_ = c.store.PutRecord(ctx, n.name, bytes.Repeat([]byte("x"), store.MaxSize))
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			phases := 0
			for ; attackedRotation(t, phases, attack); phases++ {
			}
			if t.Logf("%d phases", phases); phases < 3 { // stage, activate, settle
				t.Error("too few phases for a rotation")
			}
		})
	}
}

// attackedRotation attacks the store before one step of a rotation. It reports false if
// the rotation ended before that step.
func attackedRotation(t *testing.T, step int, attack func(*cluster)) bool {
	t.Helper()
	c := open(t)
	driver := c.nodes[0]
	former := driver.keyring().CurrentID()
	ciphertext, id, err := driver.Encrypt([]byte("seed"))
	must(t, err)
	attacked := false
	for i := range 30 {
		if i == step {
			attack(c)
			attacked = true
			for _, n := range c.nodes {
				n.start()
			}
		}
		next, err := driver.driver().Advance(ctx, former)
		if err == nil && next.Do == rotation.Settled {
			break
		}
		if i == step && err == nil && next.Do == rotation.Wait && len(next.Missing) == 0 {
			t.Errorf("step %d: the rotation waits, and names nobody", step)
		}
		for _, n := range c.nodes {
			if err := n.Sync(ctx); err != nil {
				t.Errorf("step %d: node %s: %v", step, n.name, err)
			}
			if b, err := n.Decrypt(id, ciphertext); err != nil || string(b) != "seed" {
				t.Errorf("step %d: node %s does not decrypt: %v", step, n.name, err)
			}
		}
	}
	c.settle(t)
	for _, n := range c.nodes {
		if k := n.keyring(); k.CurrentID() == former || k.StagedID() != "" || !n.Replica.State().InStep {
			t.Errorf("step %d: node %s: %s, %+v", step, n.name, k.CurrentID(), n.Replica.State())
		}
	}
	return attacked
}

// TestFloodIsNotRead: a node reads the records of the nodes that the keyring lists, and
// keeps none of the others in memory.
func TestFloodIsNotRead(t *testing.T) {
	c := open(t)
	n := c.nodes[0]
	for i := range 5000 {
		must(t, c.store.PutRecord(ctx, fmt.Sprintf("stranger-%d", i), make([]byte, keyring.MaxRecordSize/16)))
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	const times = 20
	for range times {
		must(t, n.Sync(ctx))
		all, err := n.Reports(ctx)
		if err != nil || len(all) != len(c.nodes) {
			t.Fatalf("%d reports, %v", len(all), err)
		}
	}
	runtime.ReadMemStats(&after)
	if each := (after.TotalAlloc - before.TotalAlloc) / times; each > 5000*keyring.MaxRecordSize/16/4 {
		t.Errorf("a round allocates %d bytes", each)
	}
}
