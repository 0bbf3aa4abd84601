package replica_test

import (
	"encoding/json"
	"fmt"
	"regexp"
	"testing"

	"github.com/beezy-dev/kleidi/seal/rotation"
)

// edit alters the signed part of a document, which is its member of that name, and keeps
// the MAC.
func edit(t *testing.T, b []byte, member string, change func(string) string) []byte {
	t.Helper()
	var document map[string][]byte
	must(t, json.Unmarshal(b, &document))
	before := string(document[member])
	after := change(before)
	if after == before {
		t.Fatalf("nothing is altered in %s", before)
	}
	envelope := regexp.MustCompile(fmt.Sprintf(`"%s":"[^"]*"`, member))
	part, err := json.Marshal(map[string][]byte{member: []byte(after)})
	must(t, err)
	return envelope.ReplaceAll(b, part[1:len(part)-1])
}

func replace(pattern, with string) func(string) string {
	return func(s string) string { return regexp.MustCompile(pattern).ReplaceAllString(s, with) }
}

// TestAlteredKeyring: no node takes a keyring that was altered by somebody without a KEK,
// neither in a round nor after a restart. [TestProperties] tries that in some of its runs.
func TestAlteredKeyring(t *testing.T) {
	raised := replace(`"revision":\d+`, `"revision":1000`)
	for what, alter := range map[string]func(string) string{
		"a higher revision": raised,
		"a node less":       func(s string) string { return raised(replace(`,\{"name":"c"[^}]*\}`, "")(s)) },
		"another EK":        func(s string) string { return raised(replace(`("name":"c","ek":"sha256:)0`, "${1}f")(s)) },
	} {
		c := open(t)
		there, err := c.store.Load(ctx)
		must(t, err)
		c.store.Write(edit(t, there, "body", alter))
		for _, n := range c.nodes {
			for range 2 {
				if err := n.Sync(ctx); err == nil || n.Replica.State().InStep || string(n.keyring().Shared()) != string(there) {
					t.Errorf("%s: node %s takes the keyring: %v, revision %d", what, n.name, err, n.keyring().Revision())
				}
				n.start()
			}
		}
	}
}

// TestAlteredRecord: a record that was altered by somebody without a KEK does not count. Here
// node c has not followed, and its record says that it has.
func TestAlteredRecord(t *testing.T) {
	c := open(t)
	a, away := c.nodes[0], c.nodes[2]
	must(t, a.change())
	for _, n := range c.nodes[:2] {
		must(t, n.Sync(ctx))
	}
	all, err := c.store.Records(ctx, away.name)
	must(t, err)
	if len(all) != 1 {
		t.Fatalf("%d records", len(all))
	}
	revision := fmt.Sprintf(`"revision":%d`, a.keyring().Revision())
	must(t, c.store.PutRecord(ctx, away.name, edit(t, all[0].Bytes, "record", replace(`"revision":\d+`, revision))))
	if s, err := a.driver().Advance(ctx, a.keyring().CurrentID()); err != nil || s.Do != rotation.Wait || len(s.Missing) != 1 || s.Missing[0].Node != away.name {
		t.Errorf("%+v, %v", s, err)
	}
	must(t, away.Sync(ctx)) // which writes its own record
	if s, err := a.driver().Advance(ctx, a.keyring().CurrentID()); err != nil || s.Do != rotation.Stage {
		t.Errorf("once it has followed: %+v, %v", s, err)
	}
}
