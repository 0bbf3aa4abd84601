package wanted

import (
	"slices"
	"testing"

	"github.com/beezy-dev/kleidi/internal/encryptionconfig"
	"github.com/beezy-dev/kleidi/internal/usage"
)

const socket = "/run/kleidi/kms.sock"

func parse(t *testing.T, resources string) *encryptionconfig.EncryptionConfiguration {
	t.Helper()
	e, err := encryptionconfig.Parse([]byte("apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfiguration\nresources: " + resources))
	if err != nil {
		t.Fatal(err)
	}
	return e
}

const (
	kleidi = "{kms: {apiVersion: v2, name: kleidi, endpoint: 'unix:///run/kleidi/kms.sock'}}"
	aws    = "{kms: {apiVersion: v2, name: aws, endpoint: 'unix:///aws'}}"
	old    = "{kms: {name: old, endpoint: 'unix:///old'}}"
	aescbc = "{aescbc: {keys: [{name: two, secret: c2Vj}, {name: one, secret: c2Vj}]}}"
)

// TestLeft: an object counts unless it is stored as the first provider of the first entry
// for its resource writes it.
func TestLeft(t *testing.T) {
	current := usage.Key{Provider: usage.KMSv2, Name: "kleidi", ID: "k1-now"}
	clear := usage.Key{Provider: usage.Identity}
	two := usage.Key{Provider: usage.AESCBC, ID: "two"}
	for _, tc := range []struct {
		resources, name string
		key             usage.Key
		left            bool
	}{
		{"[{resources: [secrets], providers: [" + kleidi + ", " + aescbc + "]}]", "secrets", current, false},
		{"[{resources: [secrets], providers: [" + kleidi + ", " + aescbc + "]}]", "secrets", two, true},
		{"[{resources: [secrets], providers: [" + kleidi + "]}]", "secrets", usage.Key{Provider: usage.KMSv2, Name: "kleidi", ID: "k1-former"}, true},
		{"[{resources: [secrets], providers: [" + kleidi + "]}]", "secrets", usage.Key{Provider: usage.KMSv2, Name: "kleidi-1.x", ID: "k1-now"}, true},
		{"[{resources: [secrets], providers: [" + kleidi + "]}]", "secrets", clear, true},
		{"[{resources: [secrets], providers: [" + kleidi + "]}]", "secrets", usage.Key{Provider: usage.Unknown}, true},
		// no entry names it, so it must be in the clear
		{"[{resources: [secrets], providers: [" + kleidi + "]}]", "configmaps", clear, false},
		{"[{resources: [secrets], providers: [" + kleidi + "]}]", "configmaps", current, true},
		{"[{resources: [secrets], providers: [" + kleidi + "]}]", usage.Elsewhere, current, true},
		{"[{resources: [secrets], providers: [" + aescbc + ", " + kleidi + "]}]", "secrets", two, false},
		{"[{resources: [secrets], providers: [" + aescbc + "]}]", "secrets", usage.Key{Provider: usage.AESCBC, ID: "one"}, true},
		{"[{resources: [secrets], providers: [" + aescbc + "]}]", "secrets", usage.Key{Provider: usage.AESGCM, ID: "two"}, true},
		{"[{resources: [secrets], providers: [{identity: {}}, " + kleidi + "]}]", "secrets", clear, false},
		{"[{resources: [secrets], providers: [{identity: {}}, " + kleidi + "]}]", "secrets", current, true},
		{"[{resources: [secrets], providers: [" + aws + "]}]", "secrets", usage.Key{Provider: usage.KMSv2, Name: "aws", ID: "any"}, false},
		{"[{resources: [secrets], providers: [" + aws + "]}]", "secrets", usage.Key{Provider: usage.KMSv2, Name: "other", ID: "any"}, true},
		{"[{resources: [secrets], providers: [" + old + "]}]", "secrets", usage.Key{Provider: usage.KMSv1, Name: "old"}, false},
		{"[{resources: [secrets], providers: [" + old + "]}]", "secrets", usage.Key{Provider: usage.KMSv2, Name: "old", ID: "any"}, true},
		// wildcards
		{"[{resources: [events], providers: [{identity: {}}]}, {resources: ['*.*'], providers: [" + kleidi + "]}]", "events", clear, false},
		{"[{resources: ['*.*'], providers: [" + kleidi + "]}]", "events", clear, true},
		{"[{resources: ['*.*'], providers: [" + kleidi + "]}]", "ranges", clear, false},
		{"[{resources: ['*.'], providers: [" + kleidi + "]}]", "pods", clear, true},
		{"[{resources: ['*.'], providers: [" + kleidi + "]}]", "deployments.apps", clear, false},
		{"[{resources: ['*.apps'], providers: [" + kleidi + "]}]", "deployments.apps", clear, true},
		{"[{resources: [novelties.new.k8s.io], providers: [" + kleidi + "]}]", "novelties", clear, true}, // of a later Kubernetes
		{"[{resources: ['*.*'], providers: [" + kleidi + "]}]", "novelties", clear, true},
	} {
		r := &usage.Report{Resources: []usage.Resource{{Name: tc.name, Objects: 3, Keys: []usage.Count{{Key: tc.key, Objects: 3}}}}}
		u := New(parse(t, tc.resources), socket, "k1-now").Compare([]*usage.Report{r}, "file")
		if (u.Left == 3) != tc.left || u.Left%3 != 0 || u.Stores[0].Left != u.Left {
			t.Errorf("%s: %d objects of %s under %+v are left", tc.resources, u.Left, tc.name, tc.key)
		}
	}
}

// TestNeedsKeyID: the current key ID matters where kleidi writes.
func TestNeedsKeyID(t *testing.T) {
	if !New(parse(t, "[{resources: [secrets], providers: ["+kleidi+"]}]"), socket, "").NeedsKeyID() {
		t.Error("kleidi writes")
	}
	if New(parse(t, "[{resources: [secrets], providers: [{identity: {}}, "+kleidi+"]}]"), socket, "").NeedsKeyID() {
		t.Error("kleidi only reads")
	}
	r := &usage.Report{Resources: []usage.Resource{{Name: "secrets"}, {Name: "pods"}, {Name: "ranges"}}}
	if got := New(parse(t, "[{resources: [secrets], providers: ["+kleidi+"]}]"), socket, "").Covered([]*usage.Report{r}); !slices.Equal(got, []string{"secrets"}) {
		t.Error(got)
	}
}
