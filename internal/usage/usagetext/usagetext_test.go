package usagetext

import (
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/internal/usage"
)

func report() usage.Report {
	return usage.Report{Source: "a.db", Revision: 7, Objects: 6, Snapshot: &usage.SnapshotInfo{Etcd: "3.6", Checked: true}, Resources: []usage.Resource{
		{Name: "pods", Objects: 2, Keys: []usage.Count{{Key: usage.Key{Provider: usage.Identity}, Objects: 2}}},
		{Name: "secrets", Objects: 4, Keys: []usage.Count{
			{Key: usage.Key{Provider: usage.KMSv2, Name: "kleidi", ID: "k1-now"}, Objects: 3},
			{Key: usage.Key{Provider: usage.AESCBC, ID: "key1"}, Objects: 1},
		}},
	}}
}

// TestUsage: one row for each key, one line for the resources that are entirely in the clear,
// and the verdict last.
func TestUsage(t *testing.T) {
	u := usage.Usage{KeyID: "k1-now", Stores: []usage.Store{{Report: report()}}, Left: 1}
	for _, tc := range []struct {
		file string
		all  bool
		want string
	}{
		{"", false, `a.db: revision 7, 6 objects, etcd 3.6, checksum right
RESOURCE  OBJECTS  PROVIDER       KEY
secrets   3        kms-v2 kleidi  k1-now  current
secrets   1        aescbc         key1
1 more resource with 2 objects in the clear throughout; --all lists them

1 object is not under the current key ID k1-now
`},
		{"e.yaml", true, `a.db: revision 7, 6 objects, etcd 3.6, checksum right
RESOURCE  OBJECTS  PROVIDER  KEY
pods      2        identity (in the clear)
secrets   3        kms-v2 kleidi  k1-now  current
secrets   1        aescbc         key1

not stored as e.yaml demands: 1 object
`},
	} {
		var b strings.Builder
		u.EncryptionConfig = tc.file
		Usage(&b, u, map[string]string{}, nil, tc.all)
		if b.String() != tc.want {
			t.Errorf("%s\nwant %s", b.String(), tc.want)
		}
	}
}

// TestOpenings: a key ID that the keyring lacks stands out, with the next step.
func TestOpenings(t *testing.T) {
	r := report()
	id := "k1-" + strings.Repeat("a", 52)
	r.Resources[1].Keys[0].ID = id
	for role, want := range map[string]string{"retired": "the keyring holds every key ID", "": "the snapshot is of another cluster"} {
		roles := map[string]string{}
		if role != "" {
			roles[id] = role
		}
		var b strings.Builder
		Openings(&b, []usage.Opening{usage.Opens(&r, roles)})
		if !strings.Contains(b.String(), want) || !strings.Contains(b.String(), "1 object under another provider") {
			t.Errorf("%s\nwant %s", b.String(), want)
		}
	}
}
