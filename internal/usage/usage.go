package usage

import (
	"regexp"
	"slices"
)

// Usage is the content of several stores, compared with the keys of a keyring.
type Usage struct {
	// KeyID is the key ID that every object of an encrypted resource should be under. It is
	// empty if none is known, and then nothing is compared.
	KeyID string `json:"keyID,omitempty"`
	// EncryptionConfig is the file that says how each resource should be stored, if one was
	// named.
	EncryptionConfig string `json:"encryptionConfig,omitempty"`
	// Stores are in the order in which they were named.
	Stores []Store `json:"stores"`
	// Left counts the objects of encrypted resources that are under a key other than KeyID,
	// or in the clear. With EncryptionConfig it counts the objects that kube-apiserver
	// would now write differently.
	Left int `json:"left"`
}

// Store is a report with its comparison.
type Store struct {
	Report
	Left int `json:"left"`
}

// Compare compares reports with the key ID that is current. The named resources
// count as encrypted even if all of their objects are in the clear.
func Compare(reports []*Report, keyID string, named []string) Usage {
	u := Usage{KeyID: keyID, Stores: []Store{}}
	for _, r := range reports {
		s := Store{Report: *r}
		if keyID != "" {
			s.Left = r.Left(keyID, named)
		}
		u.Left += s.Left
		u.Stores = append(u.Stores, s)
	}
	return u
}

// Opening says which key IDs of a snapshot a keyring opens.
type Opening struct {
	Source string `json:"source"`
	// Revision and Snapshot are those of [Report].
	Revision int64         `json:"revision"`
	Snapshot *SnapshotInfo `json:"snapshot,omitempty"`
	// KeyIDs are kleidi's, sorted by the number of their objects.
	KeyIDs []KeyIDUse `json:"keyIDs"`
	// Missing counts the objects whose key ID is not in the keyring.
	Missing int `json:"missing"`
	// Other counts the objects that another provider, or another KMS plugin, encrypted.
	// kleidi can't tell whether they open.
	Other int `json:"other"`
}

// KeyIDUse is a key ID with its objects.
type KeyIDUse struct {
	KeyID   string `json:"keyID"`
	Objects int    `json:"objects"`
	// Plugin is the name of the KMS plugin.
	Plugin string `json:"plugin"`
	// Role is "current", "staged" or "retired", or empty if the keyring does not hold the
	// key ID.
	Role string `json:"role,omitempty"`
	// Archive says where to find the archive of a KEK that the keyring does not hold: a
	// file, or the key ID, if the cluster store keeps it.
	Archive string `json:"archive,omitempty"`
}

// kleidiKeyID is the form of kleidi's key IDs, see docs/keyring-format.md.
var kleidiKeyID = regexp.MustCompile(`^k1-[a-z2-7]{52}$`)

// Opens compares a report with the key IDs of a keyring, given with their roles.
func Opens(r *Report, roles map[string]string) Opening {
	o := Opening{Source: r.Source, Revision: r.Revision, Snapshot: r.Snapshot, KeyIDs: []KeyIDUse{}}
	for _, resource := range r.Resources {
		for _, c := range resource.Keys {
			switch {
			case c.Provider == Identity:
			case c.Provider == KMSv2 && kleidiKeyID.MatchString(c.ID):
				o.add(c, roles[c.ID])
			default:
				o.Other += c.Objects
			}
		}
	}
	slices.SortStableFunc(o.KeyIDs, func(a, b KeyIDUse) int { return b.Objects - a.Objects })
	return o
}

func (o *Opening) add(c Count, role string) {
	if role == "" {
		o.Missing += c.Objects
	}
	i := slices.IndexFunc(o.KeyIDs, func(u KeyIDUse) bool { return u.KeyID == c.ID && u.Plugin == c.Name })
	if i < 0 {
		i = len(o.KeyIDs)
		o.KeyIDs = append(o.KeyIDs, KeyIDUse{KeyID: c.ID, Plugin: c.Name, Role: role})
	}
	o.KeyIDs[i].Objects += c.Objects
}

// Foreign reports whether the snapshot has objects under kleidi's key IDs of which the
// keyring holds none: it then belongs to another cluster.
func (o *Opening) Foreign() bool {
	return len(o.KeyIDs) > 0 && !slices.ContainsFunc(o.KeyIDs, func(u KeyIDUse) bool { return u.Role != "" })
}
