package encryptionconfig

import (
	"crypto/rand"
	"encoding/base64"
	"fmt"
	"reflect"
	"slices"
	"strings"

	"github.com/beezy-dev/kleidi/seal"
)

// The steps of a move.
const (
	// StepRead makes kube-apiserver read with the next provider, and write with the former
	// one. With several kube-apiservers it comes first: while they restart one after
	// another, each must read what the others write.
	StepRead = 1
	// StepWrite makes kube-apiserver write with the next provider, and read with the former one.
	StepWrite = 2
	// StepOnly leaves only the next provider.
	StepOnly = 3
)

// Target names the provider of a move: a kind, or a KMS plugin.
type Target struct {
	kind string
	// kms is kleidi itself.
	kms *KMS
	// name is the name of another plugin.
	name string
}

// Kleidi returns the target for this node's kleidi.
func Kleidi(name, socket string) Target {
	return Target{kind: kindKMS, kms: kleidiKMS(name, socket)}
}

// ParseTarget returns the target that a text names; own is the meaning of the word
// kleidi.
func ParseTarget(text string, own Target) (Target, error) {
	switch name, plugin := strings.CutPrefix(text, kindKMS+":"); {
	case text == "kleidi":
		return own, nil
	case plugin && name != "":
		return Target{kind: kindKMS, name: name}, nil
	case slices.Contains([]string{kindIdentity, kindAESCBC, kindAESGCM, kindSecretbox}, text):
		return Target{kind: text}, nil
	}
	return Target{}, seal.Errorf("", "want kleidi, identity, aescbc, aesgcm, secretbox, or kms:NAME for a plugin", "--to %q names no provider", text)
}

// String returns the text that names the target.
func (t Target) String() string {
	switch {
	case t.kms != nil:
		return "kleidi"
	case t.kind == kindKMS:
		return kindKMS + ":" + t.name
	}
	return t.kind
}

// Move takes kube-apiserver in steps from the providers of a configuration to another
// provider. Each step depends only on the configuration's providers and not on its
// present step, so a step can be taken back.
type Move struct {
	// From is the present configuration. A step does not change it.
	From *EncryptionConfiguration
	To   Target
	// next is the target's provider, and made says that its key was generated.
	next Provider
	made bool
}

// NewMove prepares a move. The provider with its keys comes from the configuration, or
// else from source, which may be nil. If neither has the provider, NewMove generates a
// key; a plugin must be in one of them.
func NewMove(from *EncryptionConfiguration, to Target, source *EncryptionConfiguration) (*Move, error) {
	m := &Move{From: from, To: to}
	if to.kms != nil {
		m.next = Provider{KMS: to.kms}
		return m, m.checkName()
	}
	for _, e := range []*EncryptionConfiguration{from, source} {
		if e == nil {
			continue
		}
		for _, r := range e.Resources {
			if i := slices.IndexFunc(r.Providers, to.names); i >= 0 {
				m.next = r.Providers[i]
				return m, nil
			}
		}
	}
	switch to.kind {
	case kindIdentity:
		m.next = Provider{Identity: &struct{}{}}
	case kindKMS:
		return nil, seal.Errorf("", "give an EncryptionConfiguration that has it with --provider-from, such as the copy from before kleidi", "no entry has the plugin %s", to.name)
	default:
		b := make([]byte, 32)
		_, _ = rand.Read(b) // never fails
		m.next = local(to.kind, &Keys{keyList{{Name: "key1", Secret: Secret(base64.StdEncoding.EncodeToString(b))}}})
		m.made = true
		clear(b)
	}
	return m, nil
}

// names reports whether the target names p. See [Move.is] for a provider that was found.
func (t Target) names(p Provider) bool {
	return p.Kind() == t.kind && (p.KMS == nil || p.KMS.Name == t.name)
}

// checkName refuses a file in which another plugin has kleidi's name.
func (m *Move) checkName() error {
	for _, r := range m.From.Resources {
		for _, p := range r.Providers {
			if p.KMS != nil && p.KMS.Name == m.next.KMS.Name && !m.is(p) {
				return seal.Errorf("", "set kms.name in kleidi's configuration to another name, and restart kleidi serve: stored objects name the plugin that reads them",
					"another KMS plugin is named %s as well, with the endpoint %s", p.KMS.Name, p.KMS.Endpoint)
			}
		}
	}
	return nil
}

// is reports whether p is the target's provider. The socket identifies a plugin, because
// kube-apiserver demands a different name in each entry.
func (m *Move) is(p Provider) bool {
	if p.KMS != nil && m.next.KMS != nil {
		return p.KMS.Endpoint == m.next.KMS.Endpoint && (p.KMS.APIVersion == "v2") == (m.next.KMS.APIVersion == "v2")
	}
	return p.Kind() == m.next.Kind()
}

// MadeKey reports whether the steps hold a generated key, so that all kube-apiservers
// need a copy of one file.
func (m *Move) MadeKey() bool { return m.made }

// Kept reports whether the move leaves an entry unchanged: the cluster store's entry, and
// resources that are left in the clear while others are encrypted.
func (m *Move) Kept(r Resources) bool {
	if r.Own() {
		return true
	}
	clear := func(r Resources) bool { return len(r.Providers) == 1 && r.Providers[0].Identity != nil }
	return clear(r) && slices.ContainsFunc(m.From.Resources, func(other Resources) bool { return !other.Own() && !clear(other) })
}

// Step returns the configuration of a step.
func (m *Move) Step(step int) *EncryptionConfiguration {
	e := &EncryptionConfiguration{APIVersion: apiVersion, Kind: kind}
	taken := m.From.names()
	for _, r := range m.From.Resources {
		if !m.Kept(r) {
			r.Providers = m.providers(r.Providers, step, taken)
		}
		e.Resources = append(e.Resources, r)
	}
	if m.To.kms != nil && slices.ContainsFunc(e.Resources, func(r Resources) bool { return slices.Contains(r.Resources, everything) }) && e.EncryptsStore() {
		e.Resources = slices.Insert(e.Resources, 0, ownEntry())
	}
	return e
}

// providers returns the providers of an entry in a step.
func (m *Move) providers(now []Provider, step int, taken map[string]bool) []Provider {
	next := m.next
	var others []Provider
	found := false
	for _, p := range now {
		// A second one of the target's kind has other keys, or the name in stored objects.
		if !m.is(p) || found {
			others = append(others, p)
		} else {
			next, found = p, true
		}
	}
	if !found {
		next = next.renamed(taken)
	}
	switch {
	case step == StepOnly || len(others) == 0:
		return []Provider{next}
	case step == StepWrite:
		return append([]Provider{next}, identityLast(others)...)
	}
	return append([]Provider{others[0], next}, identityLast(others[1:])...)
}

func identityLast(all []Provider) []Provider {
	all = slices.Clone(all)
	slices.SortStableFunc(all, func(a, b Provider) int {
		switch {
		case a.Identity == nil && b.Identity != nil:
			return -1
		case a.Identity != nil && b.Identity == nil:
			return 1
		}
		return 0
	})
	return all
}

// renamed returns a plugin's provider under a name that no entry has, and marks the name
// as taken.
func (p Provider) renamed(taken map[string]bool) Provider {
	if p.KMS == nil {
		return p
	}
	kms := *p.KMS
	for i := 2; taken[kms.Name]; i++ {
		kms.Name = fmt.Sprintf("%s-%d", p.KMS.Name, i)
	}
	taken[kms.Name] = true
	return Provider{KMS: &kms}
}

// names returns the names of all KMS plugins.
func (e *EncryptionConfiguration) names() map[string]bool {
	all := map[string]bool{}
	for _, r := range e.Resources {
		for _, p := range r.Providers {
			if p.KMS != nil {
				all[p.KMS.Name] = true
			}
		}
	}
	return all
}

// At returns the step that the configuration is at, or 0 before the first.
func (m *Move) At() int {
	for step := StepOnly; step >= StepRead; step-- {
		if reflect.DeepEqual(m.Step(step).Resources, m.From.Resources) {
			return step
		}
	}
	return 0
}
