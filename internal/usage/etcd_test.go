package usage

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/internal/usage/usagetest"
)

// TestMalformedPages: the pages must come from one etcd, at one revision or later, with
// keys that ascend, so that the count ends and means one store.
func TestMalformedPages(t *testing.T) {
	secret := func(name string) usagetest.Change {
		return put("/registry/secrets/a/"+name, encrypted("kleidi", "k1-a"))
	}
	first := usagetest.Part(7, 9, secret("a"), secret("m"))
	for name, tc := range map[string]struct {
		second []byte
		want   string
	}{
		"good":            {usagetest.Answer(7, 9, secret("z")), ""},
		"later":           {usagetest.Answer(7, 10, secret("z")), ""},
		"another cluster": {usagetest.Answer(8, 9, secret("z")), "members of different clusters; name the members of one etcd"},
		"went back":       {usagetest.Answer(7, 8, secret("z")), "it went back from revision 9 to 8; it may have been restored"},
		"again":           {first, "its answer is malformed"},
		"more of nothing": {usagetest.Part(7, 9), "it announces more, and holds nothing"},
		"no key":          {usagetest.Answer(7, 9, put("", nil)), "its answer is malformed"},
		"no message":      {[]byte{0xff}, "its answer is malformed"},
		"no revision":     {nil, "different clusters"},
	} {
		etcd := usagetest.StartEtcd(t.Cleanup)
		etcd.Script(first, tc.second)
		r, err := (&Etcd{Endpoints: []string{etcd.URL}}).Read(t.Context(), DefaultPrefix, nil)
		switch {
		case tc.want == "" && (err != nil || r.Objects != 3 || r.Revision != 9):
			t.Errorf("%s: %+v, %v", name, r, err)
		case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
}

// TestKine: kine over PostgreSQL answers only within kube-apiserver's prefix. An etcd also
// tells what lies outside it.
func TestKine(t *testing.T) {
	stored := []usagetest.Change{put("/registry/secrets/a/b", encrypted("kleidi", "k1-a")), put("/bootstrap/c", []byte("k3s's"))}
	for name, tc := range map[string]struct {
		server *usagetest.Etcd
		others int
	}{
		"etcd": {usagetest.StartEtcd(t.Cleanup, stored...), 1},
		"kine": {usagetest.StartKine(t.Cleanup, stored...), 0},
	} {
		r, err := (&Etcd{Endpoints: []string{tc.server.URL}}).Read(t.Context(), DefaultPrefix, nil)
		if err != nil || r.KeyIDs()["k1-a"] != 1 || r.Others != tc.others {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
	}
}

// TestTooManyKeys: a store that names more keys than any cluster has can't fill the memory.
func TestTooManyKeys(t *testing.T) {
	keys := newTally(DefaultPrefix)
	for i := range maxKinds + 1 {
		_, err := keys.kindOf([]byte("/registry/secrets/a/b"), encrypted("kleidi", fmt.Sprint("k1-", i)))
		if full := i == maxKinds; full != errors.Is(err, errTooManyKinds) {
			t.Fatalf("key %d: %v", i, err)
		}
	}
}
