package encryptionconfig

import (
	"encoding/json"
	"reflect"
	"testing"

	"go.yaml.in/yaml/v3"
)

// TestYAML: the file for people says what the object says.
func TestYAML(t *testing.T) {
	e := New("kleidi", "/run/kleidi/kms.sock", []string{"secrets", "*.apps", "*.*"})
	var file, object any
	if err := yaml.Unmarshal([]byte(e.YAML()), &file); err != nil {
		t.Fatal(err)
	}
	b, err := json.Marshal(e)
	if err == nil {
		err = yaml.Unmarshal(b, &object) // JSON is YAML
	}
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(file, object) {
		t.Errorf("the file says %+v, the object %+v", file, object)
	}
}

// TestCheckResources holds to kube-apiserver's own validation of an EncryptionConfiguration.
func TestCheckResources(t *testing.T) {
	for _, good := range [][]string{{"secrets"}, {"secrets", "configmaps"}, {"deployments.apps"}, {"*.apps"}, {"*."}, {"*.*"}, {"widgets.example.com"}, {"deployments.apps", "*."}, {"*.apps", "secrets"}, {"events"}} {
		if err := CheckResources(good); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
	for _, bad := range [][]string{nil, {""}, {"secrets", ""}, {"Secrets"}, {"*"}, {"secrets secrets"}, {"secrets", "secrets"}, {"-a"}, {"a."}, {"a: b"}, {"*.*.*"},
		{"secrets.*"}, {"events.events.k8s.io"}, {"ingresses.extensions"}, {"*.extensions"}, {"apiserveripinfo"},
		{"secrets", "*."}, {"*.", "secrets"}, {"*.*", "secrets"}, {"deployments.apps", "*.apps"}, {"*.*", "*."}} {
		if err := CheckResources(bad); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}
