package encryptionconfig

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Parse reads the parts of an EncryptionConfiguration that this package knows. A provider
// of another kind becomes an empty [Provider].
func Parse(b []byte) (*EncryptionConfiguration, error) {
	var document any
	if err := yaml.Unmarshal(b, &document); err != nil {
		return nil, err
	}
	b, err := json.Marshal(document)
	if err != nil {
		return nil, err
	}
	var e EncryptionConfiguration
	if err := json.Unmarshal(b, &e); err != nil {
		return nil, err
	}
	if e.Kind != "EncryptionConfiguration" {
		return nil, fmt.Errorf("kind %q; want EncryptionConfiguration", e.Kind)
	}
	return &e, nil
}

// Encrypts reports whether kube-apiserver writes any resource with the named plugin.
func (e *EncryptionConfiguration) Encrypts(name string) bool {
	for _, r := range e.Resources {
		if len(r.Providers) > 0 && r.Providers[0].KMS != nil && r.Providers[0].KMS.Name == name {
			return true
		}
	}
	return false
}

// Own reports whether an entry is for nothing but the cluster store.
func (r Resources) Own() bool {
	return !slices.ContainsFunc(r.Resources, func(name string) bool {
		_, group, _ := strings.Cut(name, ".")
		return group != ownGroup
	})
}

// EncryptsStore reports whether kube-apiserver encrypts a resource of the cluster store.
// The first entry that fits a resource decides, by its first provider.
func (e *EncryptionConfiguration) EncryptsStore() bool {
	for _, resource := range []string{"keyrings", "keyringnodes", "keyringarchives"} {
		name := resource + "." + ownGroup
		at := slices.IndexFunc(e.Resources, func(r Resources) bool {
			return slices.ContainsFunc(r.Resources, func(entry string) bool { return entry == name || covers(entry, name) })
		})
		if at >= 0 && len(e.Resources[at].Providers) > 0 && e.Resources[at].Providers[0].Identity == nil {
			return true
		}
	}
	return false
}
