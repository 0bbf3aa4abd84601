package encryptionconfig

import (
	"fmt"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/beezy-dev/kleidi/internal/strictyaml"
	"github.com/beezy-dev/kleidi/seal"
)

// Parse reads an EncryptionConfiguration as strictly as kube-apiserver does. Its error
// names no key.
func Parse(b []byte) (*EncryptionConfiguration, error) {
	var e EncryptionConfiguration
	var p strictyaml.Problems
	if err := strictyaml.Decode(b, &e, &p); err != nil {
		return nil, fmt.Errorf("it is no %s: %w", kind, err)
	}
	if e.Kind == "EncryptionConfig" && e.APIVersion == "v1" { // the former name, which kube-apiserver still takes
		e.APIVersion, e.Kind = apiVersion, kind
	}
	if e.Kind != kind || e.APIVersion != apiVersion {
		return nil, e.wrongKind()
	}
	if p.Err() == nil {
		e.validate(&p)
	}
	if err := p.Err(); err != nil {
		return nil, fmt.Errorf("no valid %s: %s", kind, strings.ReplaceAll(strings.TrimSpace(err.Error()), "\n  ", ", "))
	}
	return &e, nil
}

// wrongKind says what a file is instead, such as the manifest of kube-apiserver.
func (e *EncryptionConfiguration) wrongKind() error {
	const hint = "name the file in kube-apiserver's --encryption-provider-config"
	if e.Kind == "" {
		return seal.Errorf("", hint, "it is no %s: it names no kind", kind)
	}
	return seal.Errorf("", hint, "it is no %s of %s: its kind is %q of %q", kind, apiVersion, e.Kind, e.APIVersion)
}

// validate applies those of kube-apiserver's own rules on which a step of a move depends.
func (e *EncryptionConfiguration) validate(p *strictyaml.Problems) {
	if len(e.Resources) == 0 {
		p.Add("resources", "want at least one entry")
	}
	names := map[string]bool{}
	var earlier []string // resources of the entries before
	for i, r := range e.Resources {
		at := fmt.Sprintf("resources[%d]", i)
		if len(r.Resources) == 0 {
			p.Add(at+".resources", "want at least one resource")
		}
		for j, name := range r.Resources {
			if why := refused(r.Resources[:j], name); why != "" {
				p.Add(at+".resources", "%s", why)
			}
			if k := slices.IndexFunc(earlier, func(e string) bool { return covers(e, name) }); k >= 0 {
				p.Add(at+".resources", "%s is masked by the earlier entry with %s; put it first", name, earlier[k])
			}
		}
		earlier = append(earlier, r.Resources...)
		if len(r.Providers) == 0 {
			p.Add(at+".providers", "want at least one provider")
		}
		for j, provider := range r.Providers {
			provider.validate(p, fmt.Sprintf("%s.providers[%d]", at, j), names)
		}
	}
}

// validate adds the names of KMS plugins to the set of taken names.
func (p Provider) validate(found *strictyaml.Problems, at string, names map[string]bool) {
	set := 0
	for _, there := range []bool{p.KMS != nil, p.Identity != nil, p.AESCBC != nil, p.AESGCM != nil, p.Secretbox != nil} {
		if there {
			set++
		}
	}
	if set != 1 {
		found.Add(at, "want one of aescbc, aesgcm, secretbox, kms and identity")
		return
	}
	if k := p.keys(); k != nil && len(k.Keys) == 0 {
		found.Add(at+"."+p.Kind()+".keys", "want at least one key")
	}
	kms := p.KMS
	if kms == nil {
		return
	}
	switch v2 := kms.APIVersion == "v2"; {
	case !v2 && kms.APIVersion != "" && kms.APIVersion != "v1":
		found.Add(at+".kms.apiVersion", "want v1 or v2")
	case kms.Name == "":
		found.Add(at+".kms.name", "want a name")
	case v2 && (names[kms.Name] || strings.Contains(kms.Name, ":")):
		found.Add(at+".kms.name", "want a name that no other entry has, without a colon")
	case !strings.HasPrefix(kms.Endpoint, "unix://"):
		found.Add(at+".kms.endpoint", "want a socket, such as unix:///run/kleidi/kms.sock")
	}
	names[kms.Name] = true
}

// UnmarshalNode implements [strictyaml.Unmarshaler].
func (l *keyList) UnmarshalNode(n *yaml.Node, path string, p *strictyaml.Problems) {
	if n.Kind != yaml.SequenceNode {
		p.Add(path, "line %d: want a list of keys", n.Line)
		return
	}
	for i, element := range n.Content {
		var k Key
		at := fmt.Sprintf("%s[%d]", path, i)
		p.EachKey(element, at, func(key, value *yaml.Node, at string) {
			switch text := value.Kind == yaml.ScalarNode && value.Tag != "!!null"; {
			case text && key.Value == "name":
				k.Name = value.Value
			case text && key.Value == "secret":
				k.Secret = Secret(value.Value)
			case key.Value == "name" || key.Value == "secret":
				p.Add(at, "line %d: want a text", value.Line)
			default:
				p.Add(path, "line %d: want a name and a secret, and nothing else", key.Line)
			}
		})
		if k.Name == "" || k.Secret == "" {
			p.Add(at, "line %d: want a name and a secret", element.Line)
		}
		*l = append(*l, k)
	}
}

// The kinds of providers, by their words in the file.
const (
	kindIdentity  = "identity"
	kindAESCBC    = "aescbc"
	kindAESGCM    = "aesgcm"
	kindSecretbox = "secretbox"
	kindKMS       = "kms"
)

// Kind returns the provider's word in the file.
func (p Provider) Kind() string {
	switch {
	case p.KMS != nil:
		return kindKMS
	case p.AESCBC != nil:
		return kindAESCBC
	case p.AESGCM != nil:
		return kindAESGCM
	case p.Secretbox != nil:
		return kindSecretbox
	}
	return kindIdentity
}

// keys returns the keys of a provider within kube-apiserver.
func (p Provider) keys() *Keys {
	switch {
	case p.AESCBC != nil:
		return p.AESCBC
	case p.AESGCM != nil:
		return p.AESGCM
	}
	return p.Secretbox
}

// local returns a provider within kube-apiserver.
func local(kind string, k *Keys) Provider {
	switch kind {
	case kindAESCBC:
		return Provider{AESCBC: k}
	case kindAESGCM:
		return Provider{AESGCM: k}
	}
	return Provider{Secretbox: k}
}

// String returns the provider as --to names it, without its keys.
func (p Provider) String() string {
	if p.KMS != nil {
		return kindKMS + ":" + p.KMS.Name
	}
	return p.Kind()
}

// Encrypts reports whether kube-apiserver writes any resource with the named plugin. Of two
// entries with the same resource, the first one decides.
func (e *EncryptionConfiguration) Encrypts(name string) bool {
	return slices.ContainsFunc(e.All(), func(resource string) bool {
		p := e.Writer(resource)
		return p.KMS != nil && p.KMS.Name == name
	})
}

// Writes reports whether kube-apiserver writes any resource with the plugin on a socket.
func (e *EncryptionConfiguration) Writes(endpoint string) bool {
	return slices.ContainsFunc(e.Resources, func(r Resources) bool { return r.Providers[0].on(endpoint) })
}

// Names reports whether kube-apiserver reads or writes any resource with the plugin on a
// socket.
func (e *EncryptionConfiguration) Names(endpoint string) bool {
	return slices.ContainsFunc(e.Resources, func(r Resources) bool {
		return slices.ContainsFunc(r.Providers, func(p Provider) bool { return p.on(endpoint) })
	})
}

// EncryptsWithout reports whether another provider than the plugin on a socket has a key.
func (e *EncryptionConfiguration) EncryptsWithout(endpoint string) bool {
	return slices.ContainsFunc(e.Resources, func(r Resources) bool {
		return slices.ContainsFunc(r.Providers, func(p Provider) bool { return p.Identity == nil && !p.on(endpoint) })
	})
}

// on reports whether the provider is the plugin on a socket.
func (p Provider) on(endpoint string) bool { return p.KMS != nil && p.KMS.Endpoint == endpoint }

// Own reports whether an entry covers only the cluster store.
func (r Resources) Own() bool {
	return !slices.ContainsFunc(r.Resources, func(name string) bool {
		_, group, _ := strings.Cut(name, ".")
		return group != ownGroup
	})
}

// EncryptsStore reports whether kube-apiserver encrypts a resource of the cluster store.
func (e *EncryptionConfiguration) EncryptsStore() bool {
	for _, resource := range []string{"keyrings", "keyringnodes", "keyringarchives"} {
		if p := e.Writer(resource + "." + ownGroup); p != nil && p.Identity == nil {
			return true
		}
	}
	return false
}

// Writer returns the provider that writes a resource, or nil if no entry names the
// resource. The first provider of the first matching entry decides.
func (e *EncryptionConfiguration) Writer(name string) *Provider {
	for _, r := range e.Resources {
		if slices.ContainsFunc(r.Resources, func(entry string) bool { return entry == name || covers(entry, name) }) {
			return &r.Providers[0]
		}
	}
	return nil
}

// WriterOfAny is [EncryptionConfiguration.Writer] for a resource whose group is not known.
func (e *EncryptionConfiguration) WriterOfAny(name string) *Provider {
	for _, r := range e.Resources {
		if slices.ContainsFunc(r.Resources, func(entry string) bool { return entry == everything || strings.HasPrefix(entry, name+".") }) {
			return &r.Providers[0]
		}
	}
	return nil
}

// FirstKey returns the name of the key with which a provider within kube-apiserver writes.
func (p Provider) FirstKey() string {
	if k := p.keys(); k != nil {
		return k.Keys[0].Name
	}
	return ""
}

// All returns the names of all resources, without those of the cluster store.
func (e *EncryptionConfiguration) All() (names []string) {
	for _, r := range e.Resources {
		for _, name := range r.Resources {
			if !r.Own() && !slices.Contains(names, name) {
				names = append(names, name)
			}
		}
	}
	return names
}
