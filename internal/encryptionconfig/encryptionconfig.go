// Package encryptionconfig writes the configuration that makes kube-apiserver encrypt with kleidi.
package encryptionconfig

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// EncryptionConfiguration is kube-apiserver's, of apiserver.config.k8s.io/v1, as far as
// kleidi writes one.
type EncryptionConfiguration struct {
	APIVersion string      `json:"apiVersion"`
	Kind       string      `json:"kind"`
	Resources  []Resources `json:"resources"`
}

// Resources are encrypted by the first of the providers, and read by all.
type Resources struct {
	Resources []string   `json:"resources"`
	Providers []Provider `json:"providers"`
}

// Provider is one of KMS and identity.
type Provider struct {
	KMS      *KMS      `json:"kms,omitempty"`
	Identity *struct{} `json:"identity,omitempty"`
}

// KMS is a plugin that kube-apiserver asks.
type KMS struct {
	APIVersion string `json:"apiVersion"`
	Name       string `json:"name"`
	Endpoint   string `json:"endpoint"`
	Timeout    string `json:"timeout"`
}

// ownGroup is the API group of kleidi's own resources, the cluster store.
const ownGroup = "kleidi.beezy.dev"

// New has a plugin on a socket encrypt resources; what is stored in clear is still read.
// A wildcard for all groups leaves out kleidi's own resources: the API must be able to
// read the cluster store before kleidi can decrypt.
func New(name, socket string, resources []string) EncryptionConfiguration {
	kms := &KMS{APIVersion: "v2", Name: name, Endpoint: "unix://" + socket, Timeout: "3s"}
	e := EncryptionConfiguration{APIVersion: "apiserver.config.k8s.io/v1", Kind: "EncryptionConfiguration"}
	if slices.Contains(resources, everything) {
		e.Resources = append(e.Resources, Resources{[]string{"*." + ownGroup}, []Provider{{Identity: &struct{}{}}}})
	}
	e.Resources = append(e.Resources, Resources{resources, []Provider{{KMS: kms}, {Identity: &struct{}{}}}})
	return e
}

// everything is the wildcard for all resources of all groups.
const everything = "*.*"

// YAML returns the configuration as a file with comments.
func (e EncryptionConfiguration) YAML() string {
	var b strings.Builder
	fmt.Fprintf(&b, "apiVersion: %s\nkind: %s\nresources:\n", e.APIVersion, e.Kind)
	for _, r := range e.Resources {
		kms := r.Providers[0].KMS
		if kms == nil {
			b.WriteString("  # the cluster store, which kleidi must be able to read before it can decrypt;\n  # kube-apiserver takes the first entry that fits, so keep this one first\n")
		}
		b.WriteString("  - resources:\n")
		for _, name := range r.Resources {
			if strings.HasPrefix(name, "*") {
				name = "'" + name + "'" // else YAML's alias
			}
			fmt.Fprintf(&b, "      - %s\n", name)
		}
		b.WriteString("    providers:\n")
		if kms != nil {
			fmt.Fprintf(&b, provider, kms.Name, kms.Endpoint, kms.Timeout)
		}
		b.WriteString("      - identity: {}\n")
	}
	return b.String()
}

const provider = `      - kms:
          apiVersion: v2
          name: %s
          endpoint: %s
          timeout: %s
      # reads what was stored before encryption was switched on; remove it once
      # all stored objects are rewritten
`

// resourceName matches a name that kube-apiserver accepts: a resource, with its API group behind a dot
// unless that is the core one, or * for all of a group, or for all groups.
var resourceName = regexp.MustCompile(`^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*|\*\.(\*|[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*)?)$`)

// CheckResources refuses resources that kube-apiserver would refuse in one entry. The error
// names --resources.
func CheckResources(resources []string) error {
	if len(resources) == 0 {
		return errors.New("--resources is empty; name what to encrypt, such as secrets")
	}
	for i, r := range resources {
		_, group, _ := strings.Cut(r, ".")
		switch {
		case !resourceName.MatchString(r):
			return fmt.Errorf("--resources: %q is no resource; want one such as secrets, deployments.apps, *.apps or *.*", r)
		case slices.Contains(resources[:i], r):
			return fmt.Errorf("--resources names %s twice; kube-apiserver refuses that", r)
		case group == "events.k8s.io":
			return fmt.Errorf("--resources: %s is stored in the core group; write events", r)
		case group == "extensions":
			return fmt.Errorf("--resources: %s is of a group that Kubernetes has no longer; name its present group", r)
		case group == ownGroup:
			return fmt.Errorf("--resources: %s is of the cluster store, which kleidi must be able to read before it can decrypt; leave it out", r)
		case slices.Contains(unserved, r):
			return fmt.Errorf("--resources: kube-apiserver can't encrypt %s; leave it out", r)
		}
		for _, other := range resources[:i] {
			if covers(r, other) || covers(other, r) {
				return fmt.Errorf("--resources: %s and %s overlap; name one of them", other, r)
			}
		}
	}
	return nil
}

// unserved are stored by kube-apiserver, and have no API.
var unserved = []string{"apiserveripinfo", "serviceipallocations", "servicenodeportallocations"}

// covers reports whether wildcard stands for resource as well.
func covers(wildcard, resource string) bool {
	of, all := strings.CutPrefix(wildcard, "*.")
	_, group, _ := strings.Cut(resource, ".")
	return all && (of == "*" || of == group)
}
