package encryptionconfig

import (
	"encoding/json"
	"reflect"
	"testing"

	"go.yaml.in/yaml/v3"
)

// TestYAML: the YAML file and the object have the same content.
func TestYAML(t *testing.T) {
	for _, resources := range [][]string{{"secrets", "*.apps"}, {"*.*"}} {
		testYAML(t, New("kleidi", "/run/kleidi/kms.sock", resources))
	}
}

func testYAML(t *testing.T, e EncryptionConfiguration) {
	t.Helper()
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

// TestOwnResources: an entry before the wildcard leaves the cluster store unencrypted.
func TestOwnResources(t *testing.T) {
	e := New("kleidi", "/run/kleidi/kms.sock", []string{"*.*"})
	if len(e.Resources) != 2 || e.Resources[0].Resources[0] != "*.kleidi.beezy.dev" || len(e.Resources[0].Providers) != 1 || e.Resources[0].Providers[0].Identity == nil {
		t.Errorf("%+v", e)
	}
	if e := New("kleidi", "/run/kleidi/kms.sock", []string{"secrets", "*.apps"}); len(e.Resources) != 1 {
		t.Errorf("without a wildcard for all groups: %+v", e)
	}
}

// TestEncryptsStore: the first matching entry decides.
func TestEncryptsStore(t *testing.T) {
	for text, want := range map[string]bool{
		`[{resources: [secrets], providers: [{kms: {name: k, endpoint: "unix:///k"}}]}]`:                                                                      false,
		`[{resources: ['*.*'], providers: [{kms: {name: k, endpoint: "unix:///k"}}, {identity: {}}]}]`:                                                        true,
		`[{resources: ['*.kleidi.beezy.dev'], providers: [{kms: {name: k, endpoint: "unix:///k"}}]}]`:                                                         true,
		`[{resources: [keyringarchives.kleidi.beezy.dev], providers: [{aescbc: {keys: [{name: a, secret: b}]}}]}]`:                                            true,
		`[{resources: ['*.*'], providers: [{identity: {}}, {kms: {name: k, endpoint: "unix:///k"}}]}]`:                                                        false,
		`[{resources: ['*.kleidi.beezy.dev'], providers: [{identity: {}}]}, {resources: ['*.*'], providers: [{kms: {name: k, endpoint: "unix:///k"}}]}]`:      false,
		`[{resources: [keyrings.kleidi.beezy.dev], providers: [{identity: {}}]}, {resources: ['*.*'], providers: [{kms: {name: k, endpoint: "unix:///k"}}]}]`: true,
		`[{resources: [keyrings.kleidi.beezy.dev, '*.apps'], providers: [{kms: {name: k, endpoint: "unix:///k"}}]}]`:                                          true,
		`[{resources: ['*.apps', '*.'], providers: [{kms: {name: k, endpoint: "unix:///k"}}]}]`:                                                               false,
	} {
		e, err := Parse([]byte("apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfiguration\nresources: " + text + "\n"))
		if err != nil {
			t.Errorf("%s: %v", text, err)
		} else if got := e.EncryptsStore(); got != want {
			t.Errorf("%s: %t", text, got)
		}
	}
	own := New("kleidi", "/run/kleidi/kms.sock", []string{"*.*"})
	if own.EncryptsStore() || !own.Resources[0].Own() || own.Resources[1].Own() {
		t.Error("kleidi's own configuration encrypts the cluster store")
	}
}

// TestCheckResources follows kube-apiserver's own validation of an
// EncryptionConfiguration.
func TestCheckResources(t *testing.T) {
	for _, good := range [][]string{{"secrets"}, {"secrets", "configmaps"}, {"deployments.apps"}, {"*.apps"}, {"*."}, {"*.*"}, {"widgets.example.com"}, {"deployments.apps", "*."}, {"*.apps", "secrets"}, {"events"}} {
		if err := CheckResources(good); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
	for _, bad := range [][]string{nil, {""}, {"secrets", ""}, {"Secrets"}, {"*"}, {"secrets secrets"}, {"secrets", "secrets"}, {"-a"}, {"a."}, {"a: b"}, {"*.*.*"},
		{"secrets.*"}, {"events.events.k8s.io"}, {"ingresses.extensions"}, {"*.extensions"}, {"apiserveripinfo"},
		{"secrets", "*."}, {"*.", "secrets"}, {"*.*", "secrets"}, {"*.kleidi.beezy.dev"}, {"keyrings.kleidi.beezy.dev"}, {"deployments.apps", "*.apps"}, {"*.*", "*."}} {
		if err := CheckResources(bad); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}
