package usage

import (
	"cmp"
	"errors"
	"maps"
	"slices"
)

// Report says which objects of one store are under which key.
type Report struct {
	// Source is the file of the snapshot, or the etcd's endpoints.
	Source string `json:"source"`
	// Revision is etcd's revision at which everything was read.
	Revision int64 `json:"revision"`
	// Objects counts the values stored below the prefix, and the encrypted values stored
	// elsewhere.
	Objects int `json:"objects"`
	// Others counts values that are stored elsewhere in the clear. They do not belong to
	// kube-apiserver.
	Others int `json:"others,omitempty"`
	// Resources are sorted by name.
	Resources []Resource `json:"resources"`
	// Snapshot describes the file, if the source is one.
	Snapshot *SnapshotInfo `json:"snapshot,omitempty"`

	keyring []byte // the object of kleidi's shared keyring, if the source is a snapshot
}

// Resource counts the stored objects of one resource.
type Resource struct {
	// Name is in the form of an EncryptionConfiguration: secrets, or
	// crontabs.stable.example.com.
	Name    string `json:"name"`
	Objects int    `json:"objects"`
	// Keys are sorted by the number of their objects.
	Keys []Count `json:"keys"`
}

// Count is the number of objects under one key.
type Count struct {
	Key
	Objects int `json:"objects"`
}

// Encrypted reports whether any object is stored encrypted.
func (r *Resource) Encrypted() bool {
	return slices.ContainsFunc(r.Keys, func(c Count) bool { return c.Provider != Identity })
}

// empty reports whether nothing lies below the prefix.
func (r *Report) empty() bool {
	return !slices.ContainsFunc(r.Resources, func(r Resource) bool { return r.Name != Elsewhere })
}

// Under counts the objects that may need a KEK: the objects under the key ID, whatever
// the name of the plugin, and those that are encrypted in an unknown way.
func (r *Report) Under(id string) (under, unknown int) {
	for _, resource := range r.Resources {
		for _, c := range resource.Keys {
			switch {
			case c.Provider == KMSv2 && c.ID == id:
				under += c.Objects
			case c.Provider == Unknown:
				unknown += c.Objects
			}
		}
	}
	return under, unknown
}

// KeyIDs returns how many objects are under each key ID of KMS v2.
func (r *Report) KeyIDs() map[string]int {
	ids := map[string]int{}
	for _, resource := range r.Resources {
		for _, c := range resource.Keys {
			if c.Provider == KMSv2 {
				ids[c.ID] += c.Objects
			}
		}
	}
	return ids
}

// Left counts the objects that are under a key other than the KMS v2 key id. It counts
// the resources that are encrypted: the named ones, and every resource of which at
// least one object is stored encrypted.
func (r *Report) Left(id string, named []string) (objects int) {
	for _, resource := range r.Resources {
		if !resource.Encrypted() && !slices.Contains(named, resource.Name) {
			continue
		}
		for _, c := range resource.Keys {
			if c.Provider != KMSv2 || c.ID != id {
				objects += c.Objects
			}
		}
	}
	return objects
}

// maxKinds bounds the different rows of a report. A store that names more keys was filled
// to exhaust this program's memory.
const maxKinds = 10_000

var errTooManyKinds = errors.New("more than 10000 different resources and keys are stored; no cluster has that many, and the values may have been made up")

// kind is a row of a report: a resource's folder, and a key.
type kind struct {
	folder string
	Key
}

// tally counts values by kind. Its memory does not grow with the number of the objects.
type tally struct {
	prefix  string
	kinds   map[kind]int // index of counts
	counts  []int
	strings map[string]string
	others  int
}

func newTally(prefix string) *tally {
	return &tally{prefix: prefix, kinds: map[kind]int{}, strings: map[string]string{}}
}

// Elsewhere is the folder of encrypted values that do not lie below the prefix.
const Elsewhere = "(elsewhere)"

// notAnObject is the kind of a value that is stored elsewhere in the clear.
const notAnObject = -1

// kindOf returns the index of a value's kind.
func (t *tally) kindOf(key, value []byte) (int, error) {
	h := parseHeader(value)
	folder, ok := resourceOf(key, t.prefix)
	if !ok {
		if h.provider == Identity {
			return notAnObject, nil
		}
		folder = []byte(Elsewhere)
	}
	k := kind{t.intern(folder), Key{h.provider, t.intern(h.name), t.intern(h.id)}}
	i, ok := t.kinds[k]
	if !ok {
		if len(t.kinds) == maxKinds {
			return 0, errTooManyKinds
		}
		i = len(t.counts)
		t.kinds[k] = i
		t.counts = append(t.counts, 0)
	}
	return i, nil
}

// intern returns one string for equal bytes.
func (t *tally) intern(b []byte) string {
	if s, ok := t.strings[string(b)]; ok { // allocates nothing
		return s
	}
	s := string(b)
	t.strings[s] = s
	return s
}

// count adds n objects to a kind.
func (t *tally) count(kind, n int) {
	if kind == notAnObject {
		t.others += n
		return
	}
	t.counts[kind] += n
}

// report returns the counts, without empty kinds.
func (t *tally) report() Report {
	r := Report{Others: t.others, Resources: []Resource{}}
	byName := map[string]*Resource{}
	for k, i := range t.kinds {
		n := t.counts[i]
		if n == 0 {
			continue
		}
		name := resourceName(k.folder)
		resource := byName[name]
		if resource == nil {
			resource = &Resource{Name: name}
			byName[name] = resource
		}
		resource.Objects += n
		resource.Keys = append(resource.Keys, Count{k.Key, n})
		r.Objects += n
	}
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		resource := byName[name]
		slices.SortFunc(resource.Keys, func(a, b Count) int {
			return cmp.Or(cmp.Compare(b.Objects, a.Objects), cmp.Compare(a.Provider, b.Provider), cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID))
		})
		r.Resources = append(r.Resources, *resource)
	}
	return r
}

// SnapshotInfo describes the file of a snapshot.
type SnapshotInfo struct {
	// Etcd is the version of etcd's storage: 3.4, 3.5 or 3.6.
	Etcd string `json:"etcd"`
	// Checked says that the file ends in a correct checksum. A copy of etcd's database
	// file has none.
	Checked bool `json:"checked"`
	// Revisions counts the revisions in the file, including former ones and deletions.
	Revisions int `json:"revisions"`
}
