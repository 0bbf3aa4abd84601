package encryptionconfig

import (
	"encoding/json"
	"fmt"

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
