// Package encryptionconfig reads and writes the configuration that makes kube-apiserver
// encrypt: with kleidi, or with another provider before and after it.
//
// kube-apiserver writes an object with the first provider of its resource, and reads it
// with whichever provider the stored value names. So a cluster changes its provider in
// three steps, and every object stays readable in each: the next provider reads; it
// writes, and the former one reads; the former one goes. See [Move].
package encryptionconfig

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
)

// EncryptionConfiguration is kube-apiserver's, of apiserver.config.k8s.io/v1. Its JSON
// form leaves the keys out.
type EncryptionConfiguration struct {
	APIVersion string      `json:"apiVersion" yaml:"apiVersion"`
	Kind       string      `json:"kind" yaml:"kind"`
	Resources  []Resources `json:"resources" yaml:"resources"`
}

// Resources are encrypted with the first of the providers, and read with all of them.
type Resources struct {
	Resources []string   `json:"resources" yaml:"resources"`
	Providers []Provider `json:"providers" yaml:"providers"`
}

// Provider has one field set.
type Provider struct {
	KMS       *KMS      `json:"kms,omitempty" yaml:"kms"`
	Identity  *struct{} `json:"identity,omitempty" yaml:"identity"`
	AESCBC    *Keys     `json:"-" yaml:"aescbc"`
	AESGCM    *Keys     `json:"-" yaml:"aesgcm"`
	Secretbox *Keys     `json:"-" yaml:"secretbox"`
}

// KMS is a plugin that kube-apiserver asks. Without an APIVersion it is v1.
type KMS struct {
	APIVersion string `json:"apiVersion" yaml:"apiVersion"`
	Name       string `json:"name" yaml:"name"`
	Endpoint   string `json:"endpoint" yaml:"endpoint"`
	Timeout    string `json:"timeout" yaml:"timeout"`
	// CacheSize is for v1 only.
	CacheSize *int32 `json:"-" yaml:"cachesize"`
}

// Keys are the keys of a provider within kube-apiserver. The first one encrypts.
type Keys struct {
	Keys keyList `yaml:"keys"`
}

// Key is a key with its name, which precedes each object that is encrypted with it.
type Key struct {
	Name   string
	Secret Secret
}

// Secret is a key in base64. Only [EncryptionConfiguration.YAML] writes it.
type Secret string

func (Secret) String() string               { return "(secret)" }
func (Secret) GoString() string             { return "(secret)" }
func (Secret) MarshalJSON() ([]byte, error) { return nil, errors.New("a key is not written as JSON") }

// ownGroup is the API group of kleidi's own resources, the cluster store.
const ownGroup = "kleidi.beezy.dev"

// New returns a configuration in which a plugin on a socket encrypts resources; objects
// stored in the clear are still read. A wildcard for all groups leaves out kleidi's own
// resources: the API must be able to read the cluster store before kleidi can decrypt.
func New(name, socket string, resources []string) EncryptionConfiguration {
	e := EncryptionConfiguration{APIVersion: apiVersion, Kind: kind}
	if slices.Contains(resources, everything) {
		e.Resources = append(e.Resources, ownEntry())
	}
	e.Resources = append(e.Resources, Resources{resources, []Provider{{KMS: kleidiKMS(name, socket)}, {Identity: &struct{}{}}}})
	return e
}

// InClear returns the configuration of the same resources before they were encrypted.
func (e EncryptionConfiguration) InClear() *EncryptionConfiguration {
	former := &EncryptionConfiguration{APIVersion: apiVersion, Kind: kind}
	for _, r := range e.Resources {
		former.Resources = append(former.Resources, Resources{r.Resources, []Provider{{Identity: &struct{}{}}}})
	}
	return former
}

// The present version and kind.
const (
	apiVersion = "apiserver.config.k8s.io/v1"
	kind       = "EncryptionConfiguration"
)

func kleidiKMS(name, socket string) *KMS {
	return &KMS{APIVersion: "v2", Name: name, Endpoint: "unix://" + socket, Timeout: "3s"}
}

func ownEntry() Resources {
	return Resources{[]string{"*." + ownGroup}, []Provider{{Identity: &struct{}{}}}}
}

// everything is the wildcard for all resources of all groups.
const everything = "*.*"

// resourceName matches a name that kube-apiserver accepts: a resource, followed by a dot
// and its API group unless that is the core group; or * for all resources of a group, or
// of all groups.
var resourceName = regexp.MustCompile(`^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*|\*\.(\*|[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*)?)$`)

// CheckResources refuses resources that kube-apiserver would refuse in one entry. The error
// names --resources.
func CheckResources(resources []string) error {
	if len(resources) == 0 {
		return errors.New("--resources is empty; name what to encrypt, such as secrets")
	}
	for i, r := range resources {
		_, group, _ := strings.Cut(r, ".")
		why := refused(resources[:i], r)
		switch {
		case !resourceName.MatchString(r):
			why = fmt.Sprintf(noResource, r)
		case group == ownGroup && why == "":
			why = r + " belongs to the cluster store, which kleidi must be able to read before it can decrypt; leave it out"
		}
		if why != "" {
			return fmt.Errorf("--resources: %s", why)
		}
	}
	return nil
}

const noResource = "%q is not a resource; want one such as secrets, deployments.apps, *.apps or *.*"

// refused says why kube-apiserver refuses a resource after others in the same entry, or
// returns nothing.
func refused(before []string, r string) string {
	name, group, _ := strings.Cut(r, ".")
	switch {
	case strings.ToLower(r) != r || r == "*" || group == "*" && name != "*":
		return fmt.Sprintf(noResource, r)
	case slices.Contains(before, r):
		return "the entry names " + r + " twice; kube-apiserver refuses that"
	case group == "events.k8s.io":
		return r + " is stored in the core group; write events"
	case group == "extensions":
		return r + " is in a group that Kubernetes no longer has; name its present group"
	case slices.Contains(unserved, r):
		return "kube-apiserver can't encrypt " + r + "; leave it out"
	}
	for _, other := range before {
		if covers(r, other) || covers(other, r) {
			return other + " and " + r + " overlap; name one of them"
		}
	}
	return ""
}

// unserved are resources that kube-apiserver stores but does not serve.
var unserved = []string{"apiserveripinfo", "serviceipallocations", "servicenodeportallocations"}

// covers reports whether wildcard includes resource.
func covers(wildcard, resource string) bool {
	of, all := strings.CutPrefix(wildcard, "*.")
	_, group, _ := strings.Cut(resource, ".")
	return all && (of == "*" || of == group)
}

// keyList decodes itself, so that no problem quotes a key.
type keyList []Key
