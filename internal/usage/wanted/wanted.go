// Package wanted compares stored objects with an EncryptionConfiguration: whether each
// object is stored as kube-apiserver would write it now.
package wanted

import (
	"slices"
	"strings"

	"github.com/beezy-dev/kleidi/internal/encryptionconfig"
	"github.com/beezy-dev/kleidi/internal/usage"
)

// Wanted says how kube-apiserver writes each resource. A resource that it does not
// encrypt must be in the clear, since nothing could read it otherwise.
type Wanted struct {
	config *encryptionconfig.EncryptionConfiguration
	socket string
	keyID  string
}

// New returns the demands of an EncryptionConfiguration. keyID is the key ID under which
// the plugin behind socket should encrypt, if it is known.
func New(e *encryptionconfig.EncryptionConfiguration, socket, keyID string) *Wanted {
	return &Wanted{e, socket, keyID}
}

// NeedsKeyID reports whether the plugin behind the socket writes anything.
func (w *Wanted) NeedsKeyID() bool {
	return slices.ContainsFunc(w.config.Resources, func(r encryptionconfig.Resources) bool { return w.own(r.Providers[0]) })
}

func (w *Wanted) own(p encryptionconfig.Provider) bool {
	return p.KMS != nil && p.KMS.Endpoint == "unix://"+w.socket
}

// unserved are folders of kube-apiserver's own, which have no API and are never encrypted.
var unserved = []string{"ranges", "masterleases", "peerserverleases", "health", usage.Elsewhere}

// key returns how a resource should be stored. covered says that the configuration names
// the resource.
func (w *Wanted) key(resource string) (k usage.Key, covered bool) {
	if slices.Contains(unserved, resource) {
		return usage.Key{Provider: usage.Identity}, false
	}
	p := w.config.Writer(resource)
	if p == nil && !strings.Contains(resource, ".") { // of a built-in group that is not in groups
		p = w.config.WriterOfAny(resource)
	}
	if p == nil {
		return usage.Key{Provider: usage.Identity}, false
	}
	switch {
	case p.KMS != nil && p.KMS.APIVersion != "v2":
		return usage.Key{Provider: usage.KMSv1, Name: p.KMS.Name}, true
	case p.KMS != nil && w.own(*p):
		return usage.Key{Provider: usage.KMSv2, Name: p.KMS.Name, ID: w.keyID}, true
	case p.KMS != nil:
		return usage.Key{Provider: usage.KMSv2, Name: p.KMS.Name}, true
	case p.Identity != nil:
		return usage.Key{Provider: usage.Identity}, true
	}
	return usage.Key{Provider: usage.Provider(p.Kind()), ID: p.FirstKey()}, true
}

// is reports whether an object under k is stored as wanted. For a plugin other than
// kleidi, only the plugin itself knows its current key.
func is(k, want usage.Key) bool {
	if want.Provider == usage.KMSv2 && want.ID == "" {
		k.ID = ""
	}
	return k == want
}

// left counts the objects of a report that are stored in any other way.
func (w *Wanted) left(r *usage.Report) (objects int) {
	for _, resource := range r.Resources {
		want, _ := w.key(resource.Name)
		for _, c := range resource.Keys {
			if !is(c.Key, want) {
				objects += c.Objects
			}
		}
	}
	return objects
}

// Covered returns the names of the resources in a report that the configuration names.
func (w *Wanted) Covered(reports []*usage.Report) (names []string) {
	for _, r := range reports {
		for _, resource := range r.Resources {
			if _, ok := w.key(resource.Name); ok {
				names = append(names, resource.Name)
			}
		}
	}
	return names
}

// Compare compares reports with the EncryptionConfiguration, which is in a file.
func (w *Wanted) Compare(reports []*usage.Report, file string) usage.Usage {
	u := usage.Usage{KeyID: w.keyID, EncryptionConfig: file, Stores: []usage.Store{}}
	for _, r := range reports {
		s := usage.Store{Report: *r, Left: w.left(r)}
		u.Left += s.Left
		u.Stores = append(u.Stores, s)
	}
	return u
}
