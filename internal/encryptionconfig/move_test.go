package encryptionconfig

import (
	"fmt"
	"reflect"
	"strings"
	"testing"
)

const socket = "/run/kleidi/kms.sock"

// config returns a configuration of entries such as "secrets configmaps: aescbc identity".
// A word with a slash is a KMS plugin v2, NAME/SOCKET; v1:NAME/SOCKET is one of v1.
func config(t *testing.T, entries ...string) *EncryptionConfiguration {
	t.Helper()
	e := EncryptionConfiguration{APIVersion: apiVersion, Kind: kind}
	for _, entry := range entries {
		resources, providers, _ := strings.Cut(entry, ": ")
		r := Resources{Resources: strings.Fields(resources)}
		for _, word := range strings.Fields(providers) {
			name, path, plugin := strings.Cut(word, "/")
			switch {
			case plugin && strings.HasPrefix(name, "v1:"):
				size := int32(100)
				r.Providers = append(r.Providers, Provider{KMS: &KMS{Name: name[3:], Endpoint: "unix:///" + path, CacheSize: &size}})
			case plugin:
				r.Providers = append(r.Providers, Provider{KMS: &KMS{APIVersion: "v2", Name: name, Endpoint: "unix:///" + path, Timeout: "3s"}})
			case word == kindIdentity:
				r.Providers = append(r.Providers, Provider{Identity: &struct{}{}})
			default:
				r.Providers = append(r.Providers, local(word, &Keys{keyList{{Name: "old", Secret: "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="}}}))
			}
		}
		e.Resources = append(e.Resources, r)
	}
	parsed, err := Parse([]byte(e.YAML()))
	if err != nil {
		t.Fatalf("%v\n%s", err, e.YAML())
	}
	if !reflect.DeepEqual(*parsed, e) {
		t.Fatalf("written and read: %+v\n%s", parsed, e.YAML())
	}
	return parsed
}

// words is the inverse of config.
func words(e *EncryptionConfiguration) (all []string) {
	for _, r := range e.Resources {
		var providers []string
		for _, p := range r.Providers {
			word := p.Kind()
			if p.KMS != nil {
				word = p.KMS.Name + strings.TrimPrefix(p.KMS.Endpoint, "unix://")
				if p.KMS.APIVersion != "v2" {
					word = "v1:" + word
				}
			}
			providers = append(providers, word)
		}
		all = append(all, strings.Join(r.Resources, " ")+": "+strings.Join(providers, " "))
	}
	return all
}

func target(t *testing.T, text string) Target {
	t.Helper()
	to, err := ParseTarget(text, Kleidi("kleidi", socket))
	if err != nil {
		t.Fatal(err)
	}
	if to.String() != text {
		t.Errorf("%s reads as %s", text, to)
	}
	return to
}

// TestMove takes each step of each move, from each of its steps.
func TestMove(t *testing.T) {
	const own, k = "*.kleidi.beezy.dev: identity", "kleidi/run/kleidi/kms.sock"
	for _, tc := range []struct {
		to    string
		steps [4][]string // at 0 before the first
	}{
		{"kleidi", [4][]string{{"secrets: identity"}, {"secrets: identity " + k}, {"secrets: " + k + " identity"}, {"secrets: " + k}}},
		{"kleidi", [4][]string{{"secrets: aescbc identity"}, {"secrets: aescbc " + k + " identity"}, {"secrets: " + k + " aescbc identity"}, {"secrets: " + k}}},
		{"kleidi", [4][]string{{"secrets: secretbox"}, {"secrets: secretbox " + k}, {"secrets: " + k + " secretbox"}, {"secrets: " + k}}},
		{"kleidi", [4][]string{{"secrets: v1:old/old.sock aesgcm"}, {"secrets: v1:old/old.sock " + k + " aesgcm"}, {"secrets: " + k + " v1:old/old.sock aesgcm"}, {"secrets: " + k}}},
		// identity stays last of the readers, wherever it was
		{"kleidi", [4][]string{{"secrets: aescbc identity aesgcm"}, {"secrets: aescbc " + k + " aesgcm identity"}, {"secrets: " + k + " aescbc aesgcm identity"}, {"secrets: " + k}}},
		// one name for each entry; resources in the clear are left in the clear
		{"kleidi", [4][]string{
			{"events: identity", "secrets: aws/aws.sock", "configmaps *.apps: aws-2/aws.sock identity"},
			{"events: identity", "secrets: aws/aws.sock " + k, "configmaps *.apps: aws-2/aws.sock kleidi-2/run/kleidi/kms.sock identity"},
			{"events: identity", "secrets: " + k + " aws/aws.sock", "configmaps *.apps: kleidi-2/run/kleidi/kms.sock aws-2/aws.sock identity"},
			{"events: identity", "secrets: " + k, "configmaps *.apps: kleidi-2/run/kleidi/kms.sock"},
		}},
		// the cluster store is left in the clear
		{"kleidi", [4][]string{{"*.*: aescbc"}, {own, "*.*: aescbc " + k}, {own, "*.*: " + k + " aescbc"}, {own, "*.*: " + k}}},
		{"kleidi", [4][]string{{own, "*.*: identity"}, {own, "*.*: identity " + k}, {own, "*.*: " + k + " identity"}, {own, "*.*: " + k}}},
		{"identity", [4][]string{{"secrets: " + k}, {"secrets: " + k + " identity"}, {"secrets: identity " + k}, {"secrets: identity"}}},
		{"aescbc", [4][]string{{"secrets: " + k}, {"secrets: " + k + " aescbc"}, {"secrets: aescbc " + k}, {"secrets: aescbc"}}},
		{"kms:aws", [4][]string{
			{own, "*.*: " + k}, {own, "*.*: " + k + " aws/aws.sock"}, {own, "*.*: aws/aws.sock " + k}, {own, "*.*: aws/aws.sock"}}},
	} {
		source := config(t, "secrets: aescbc aws/aws.sock")
		t.Run(fmt.Sprint(tc.to, " from ", tc.steps[0]), func(t *testing.T) {
			for at, now := range tc.steps {
				m, err := NewMove(config(t, now...), target(t, tc.to), source)
				if err != nil {
					t.Fatal(err)
				}
				if got := m.At(); got != at {
					t.Errorf("%q is at step %d, want %d", now, got, at)
				}
				for step := 1; step <= min(3, max(at+1, 1)); step++ {
					want := tc.steps[step]
					if at == StepOnly { // the other providers are gone
						want = tc.steps[at]
					}
					got := m.Step(step)
					if !reflect.DeepEqual(words(got), want) {
						t.Errorf("at %d, step %d: %q, want %q", at, step, words(got), want)
					}
					config(t, words(got)...) // the result is valid
				}
			}
		})
	}
}

// TestTwoOfTheTargetsKind: a second provider of the target's kind, with other keys or another
// name, stays a reader until step 3.
func TestTwoOfTheTargetsKind(t *testing.T) {
	const k = "kleidi/run/kleidi/kms.sock"
	for now, to := range map[string]string{"secrets: " + k + " former/run/kleidi/kms.sock identity": "kleidi", "secrets: aescbc aescbc identity": "aescbc"} {
		from := config(t, now)
		if to == "aescbc" {
			from.Resources[0].Providers[1].AESCBC.Keys[0].Secret = "the second"
		}
		m, err := NewMove(from, target(t, to), nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := m.Step(StepWrite).Resources; m.At() != StepWrite || !reflect.DeepEqual(got, from.Resources) {
			t.Errorf("%q is at step %d, which is %+v", now, m.At(), got)
		}
		if got := m.Step(StepOnly).Resources[0].Providers; len(got) != 1 {
			t.Errorf("%q ends in %+v", now, got)
		}
	}
}

// TestWayBack: each step in the middle of the way back is a step of the way there.
func TestWayBack(t *testing.T) {
	there := [][]string{{"secrets: aescbc"}, {"secrets: aescbc kleidi/run/kleidi/kms.sock"}, {"secrets: kleidi/run/kleidi/kms.sock aescbc"}}
	for at, now := range there {
		m, err := NewMove(config(t, now...), target(t, "aescbc"), nil)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := m.At(), StepOnly-at; got != want {
			t.Errorf("%q is at step %d back, want %d", now, got, want)
		}
		if got := words(m.Step(StepOnly)); !reflect.DeepEqual(got, there[0]) {
			t.Errorf("%q ends in %q", now, got)
		}
		if m.MadeKey() {
			t.Error("a key was made although there is one")
		}
	}
}

// TestKeys: a key is generated once for all entries, or taken from the present entry or
// source.
func TestKeys(t *testing.T) {
	from := config(t, "secrets: kleidi/run/kleidi/kms.sock", "configmaps: kleidi-2/run/kleidi/kms.sock")
	m, err := NewMove(from, target(t, "secretbox"), nil)
	if err != nil || !m.MadeKey() {
		t.Fatal(m, err)
	}
	e := m.Step(StepWrite)
	one, two := e.Resources[0].Providers[0].Secretbox, e.Resources[1].Providers[0].Secretbox
	if one == nil || two == nil || one.Keys[0] != two.Keys[0] || len(one.Keys[0].Secret) != 44 {
		t.Errorf("%d bytes", len(one.Keys[0].Secret))
	}
	source := config(t, "secrets: secretbox")
	if m, err = NewMove(from, target(t, "secretbox"), source); err != nil || m.MadeKey() || m.Step(StepWrite).Resources[0].Providers[0].Secretbox.Keys[0].Name != "old" {
		t.Errorf("%v, made %t", err, m.MadeKey())
	}
	if _, err := NewMove(from, target(t, "kms:aws"), source); err == nil || !strings.Contains(err.Error(), "--provider-from") {
		t.Error(err)
	}
}

// TestOtherPlugin: a plugin of the same name is not kleidi.
func TestOtherPlugin(t *testing.T) {
	for _, other := range []string{"kleidi/opt/kleidi/kms.sock", "v1:kleidi/run/kleidi/kms.sock"} { // kleidi speaks only v2
		_, err := NewMove(config(t, "secrets: "+other), target(t, "kleidi"), nil)
		if err == nil || !strings.Contains(err.Error(), "set kms.name") {
			t.Errorf("%s: %v", other, err)
		}
	}
	for _, bad := range []string{"", "kms:", "aes", "KLEIDI"} {
		if _, err := ParseTarget(bad, Target{}); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

// TestParseRefuses: Parse refuses what kube-apiserver refuses, and no message contains a
// key.
func TestParseRefuses(t *testing.T) {
	const key = "c2VjcmV0IGlzIHNlY3VyZQ=="
	for text, want := range map[string]string{
		"[{resources: [secrets], providers: [{aescbc: {keys: " + key + "}}]}]":                               "want a list of keys",
		"[{resources: [secrets], providers: [{aescbc: " + key + "}]}]":                                       "aescbc",
		"[{resources: [secrets], providers: [{aescbc: {keys: [" + key + "]}}]}]":                             "keys[0]",
		"[{resources: [secrets], providers: [{aescbc: {keys: [{name: a, secret: [" + key + "]}]}}]}]":        "want a text",
		"[{resources: [secrets], providers: [{aescbc: {keys: [{name: a, secret: b, " + key + ": c}]}}]}]":    "nothing else",
		"[{resources: [secrets], providers: [{aescbc: {keys: [{name: a}]}}]}]":                               "want a name and a secret",
		"[{resources: [secrets], providers: [{aescbc: {keys: []}}]}]":                                        "at least one key",
		"[{resources: [secrets], providers: [{identity: {}, kms: {name: a, endpoint: 'unix:///a'}}]}]":       "want one of",
		"[{resources: [secrets], providers: [{kms: {apiVersion: v3, name: a, endpoint: 'unix:///a'}}]}]":     "want v1 or v2",
		"[{resources: [secrets], providers: [{kms: {name: a, endpoint: 'http://a'}}]}]":                      "want a socket",
		"[{resources: [secrets], providers: [{kms: {apiVersion: v2, name: 'a:b', endpoint: 'unix:///a'}}]}]": "without a colon",
		"[{resources: [secrets], providers: [{kms: {name: a, endpoint: 'unix:///a', key: b}}]}]":             "unknown key",
		"[{resources: [secrets], providers: [{KMS: {name: a, endpoint: 'unix:///a'}}]}]":                     "unknown key",
		"[{resources: [secrets], providers: []}]":                                                            "at least one provider",
		"[{resources: [], providers: [{identity: {}}]}]":                                                     "at least one resource",
		"[]": "at least one entry",
		"[{resources: [secrets, '*.*'], providers: [{identity: {}}]}]":                                                                                            "secrets and *.* overlap",
		"[{resources: ['*.apps', deployments.apps], providers: [{identity: {}}]}]":                                                                                "*.apps and deployments.apps overlap",
		"[{resources: [secrets, secrets], providers: [{identity: {}}]}]":                                                                                          "twice",
		"[{resources: [Secrets], providers: [{identity: {}}]}]":                                                                                                   "not a resource",
		"[{resources: ['*'], providers: [{identity: {}}]}]":                                                                                                       "not a resource",
		"[{resources: ['secrets.*'], providers: [{identity: {}}]}]":                                                                                               "not a resource",
		"[{resources: ['*.'], providers: [{identity: {}}]}, {resources: [secrets], providers: [{identity: {}}]}]":                                                 "secrets is masked by the earlier entry with *.;",
		"[{resources: ['*.apps'], providers: [{identity: {}}]}, {resources: ['*.apps'], providers: [{identity: {}}]}]":                                            "*.apps is masked",
		"[{resources: ['*.*'], providers: [{identity: {}}]}, {resources: ['*.apps'], providers: [{identity: {}}]}]":                                               "*.apps is masked by the earlier entry with *.*;",
		"[{resources: [secrets], providers: [{kms: {apiVersion: v2, name: a, endpoint: 'unix:///a'}}, {kms: {apiVersion: v2, name: a, endpoint: 'unix:///b'}}]}]": "no other entry has",
	} {
		_, err := Parse([]byte("apiVersion: " + apiVersion + "\nkind: " + kind + "\nresources: " + text + "\n"))
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), key) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
	for text, want := range map[string]string{
		"":                            "it names no kind; name the file in kube-apiserver's --encryption-provider-config",
		"a text, and no YAML":         "it names no kind; name the file",
		"{kind: Pod, apiVersion: v1}": `its kind is "Pod" of "v1"; name the file in kube-apiserver's --encryption-provider-config`,
		"kind: " + kind:               `its kind is "EncryptionConfiguration" of ""`,
		"a: &" + key + "\n  b":        "it is no EncryptionConfiguration",
		"{":                           "it is no EncryptionConfiguration: yaml: ",
		"\x00\x01":                    "it is no EncryptionConfiguration: yaml: ",
	} {
		if _, err := Parse([]byte(text)); err == nil || strings.Contains(err.Error(), key) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
	if s := fmt.Sprintf("%v %+v %#v %s", Key{"a", key}, Key{"a", key}, Key{"a", key}, Secret(key)); strings.Contains(s, key) {
		t.Error(s)
	}
}

// TestEncrypts: of two entries with the same resource the first one writes, and a narrow
// entry before a wide one is good.
func TestEncrypts(t *testing.T) {
	const kms = "[{kms: {apiVersion: v2, name: kleidi, endpoint: 'unix:///a'}}]"
	for text, want := range map[string]bool{
		"[{resources: [secrets], providers: " + kms + "}]":                                                                  true,
		"[{resources: [secrets], providers: [{identity: {}}]}, {resources: ['*.'], providers: " + kms + "}]":                true,
		"[{resources: [secrets], providers: [{identity: {}}]}, {resources: [secrets], providers: " + kms + "}]":             false,
		"[{resources: [secrets], providers: [{identity: {}}]}, {resources: [secrets, configmaps], providers: " + kms + "}]": true,
		"[{resources: ['*.apps', '*.'], providers: [{identity: {}}]}, {resources: ['*.*'], providers: " + kms + "}]":        true,
		"[{resources: ['*.kleidi.beezy.dev'], providers: " + kms + "}, {resources: ['*.*'], providers: [{identity: {}}]}]":  false,
	} {
		e, err := Parse([]byte("apiVersion: " + apiVersion + "\nkind: " + kind + "\nresources: " + text + "\n"))
		if err != nil || e.Encrypts("kleidi") != want {
			t.Errorf("%s: %v, want %t", text, err, want)
		}
	}
}

// TestFormats: JSON as RKE2 and k3s write it, and the former kind, can be read.
func TestFormats(t *testing.T) {
	for _, text := range []string{
		`{"kind":"EncryptionConfiguration","apiVersion":"apiserver.config.k8s.io/v1","resources":[{"resources":["secrets"],"providers":[{"aescbc":{"keys":[{"name":"aescbckey","secret":"bm9uZQ=="}]}},{"identity":{}}]}]}`,
		"kind: EncryptionConfig\napiVersion: v1\nresources:\n- resources: [secrets]\n  providers:\n  - aescbc: {keys: [{name: aescbckey, secret: bm9uZQ==}]}\n  - identity: {}\n",
	} {
		e, err := Parse([]byte(text))
		if err != nil {
			t.Fatal(err)
		}
		if got := words(e); !reflect.DeepEqual(got, []string{"secrets: aescbc identity"}) || e.Resources[0].Providers[0].AESCBC.Keys[0] != (Key{"aescbckey", "bm9uZQ=="}) || e.Kind != kind {
			t.Errorf("%q", got)
		}
	}
}

// TestScalar: every text is read back as written.
func TestScalar(t *testing.T) {
	for _, name := range []string{"a", "0", "1e3", "0x1f", "true", "Null", "~", "-", "-a", ".5", "a b", "a: b", "#", "'", "\"", "\\", "1_0", "1.2", "3s", "2026-11-29", "y", "é", "a\nb", "unix:///run/kms.sock", "AA==", "+1/2=", "!x", "&x", "*x", "@x", "`x", "12:30", ".inf", ".NaN", "0b1", "0o7"} {
		e := &EncryptionConfiguration{APIVersion: apiVersion, Kind: kind, Resources: []Resources{{[]string{"secrets"}, []Provider{local(kindAESGCM, &Keys{keyList{{name, Secret(name)}}})}}}}
		got, err := Parse([]byte(e.YAML()))
		if err != nil || got.Resources[0].Providers[0].AESGCM.Keys[0] != (Key{name, Secret(name)}) {
			t.Errorf("%q: %v\n%s", name, err, e.YAML())
		}
	}
}
