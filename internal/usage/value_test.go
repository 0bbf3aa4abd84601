package usage

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
)

func keyOf(value []byte) Key {
	h := parseHeader(value)
	return Key{h.provider, string(h.name), string(h.id)}
}

func TestParseHeader(t *testing.T) {
	whole := string(encrypted("kleidi", "k1-abc"))
	field := func(number protowire.Number, value string) string {
		return string(protowire.AppendString(protowire.AppendTag(nil, number, protowire.BytesType), value))
	}
	object := func(fields ...string) string { return "k8s:enc:kms:v2:kleidi:" + strings.Join(fields, "") }
	fixed := string(protowire.AppendFixed32(protowire.AppendTag(nil, 9, protowire.Fixed32Type), 1))
	longest := strings.Repeat("k", maxName)
	noData := "k8s:enc:kms:v2:kleidi:" + string(protowire.AppendString(protowire.AppendTag(nil, 2, protowire.BytesType), "k1-abc"))
	for value, want := range map[string]Key{
		"k8s\x00\n\x0bplain":                    {Provider: Identity},
		`{"kind":"Keyring"}`:                    {Provider: Identity},
		"":                                      {Provider: Identity},
		"k8s:enc":                               {Provider: Identity},
		whole:                                   {KMSv2, "kleidi", "k1-abc"},
		string(encrypted("other", "arn:aws:k")): {KMSv2, "other", "arn:aws:k"},
		"k8s:enc:kms:v1:vault:\x00\x01x":        {KMSv1, "vault", ""},
		"k8s:enc:aescbc:v1:key1:\x01\x02":       {AESCBC, "", "key1"},
		"k8s:enc:aesgcm:v1:key2:\x01\x02":       {AESGCM, "", "key2"},
		"k8s:enc:secretbox:v1:key3:\x01\x02":    {Secretbox, "", "key3"},
		"k8s:enc:":                              {Provider: Unknown},
		"k8s:enc:kms:v3:kleidi:\x01":            {Provider: Unknown},
		"k8s:enc:kms:v2:kleidi":                 {Provider: Unknown},
		"k8s:enc:kms:v2::x":                     {Provider: Unknown},
		"k8s:enc:aescbc:v1:key1:":               {Provider: Unknown},
		"k8s:enc:kms:v2:kleidi:\xff\xff":        {Provider: Unknown},
		whole[:len(whole)-1]:                    {Provider: Unknown}, // kube-apiserver could not read it
		noData:                                  {Provider: Unknown},
		string(encrypted("kleidi", "")):         {Provider: Unknown},
		// As in protobuf, the order of the fields does not matter, the last value of a field
		// counts, and other fields say nothing about the key.
		object(field(2, "k1-abc"), field(1, "x")):                                              {KMSv2, "kleidi", "k1-abc"},
		object(field(1, "x"), field(2, "k1-old"), field(2, "k1-abc")):                          {KMSv2, "kleidi", "k1-abc"},
		object(field(1, "x"), field(2, "k1-abc"), field(3, "k1-no"), field(4, "k1-no"), fixed): {KMSv2, "kleidi", "k1-abc"},
		object(field(1, "x"), field(3, "k1-no"), field(4, "k1-no")):                            {Provider: Unknown},
		object(field(1, "x"), field(2, "k1-abc"), field(2, "")):                                {Provider: Unknown},
		object(field(1, "x"), field(2, "k1-abc"), field(1, "")):                                {Provider: Unknown},
		object(field(1, "x"), field(2, longest)):                                               {KMSv2, "kleidi", longest},
		"k8s:enc:aescbc:v1:" + longest + ":x":                                                  {AESCBC, "", longest},
		"k8s:enc:aescbc:v1:k" + longest + ":x":                                                 {Provider: Unknown},
		string(encrypted("kleidi", strings.Repeat("k", 1025))):                                 {Provider: Unknown},
	} {
		if got := keyOf([]byte(value)); got != want {
			t.Errorf("%.40q: %+v, want %+v", value, got, want)
		}
	}
}

func TestResources(t *testing.T) {
	for key, want := range map[string]string{
		"/registry/secrets/default/a":                      "secrets",
		"/registry/namespaces/default":                     "namespaces",
		"/registry/minions/node-1":                         "nodes",
		"/registry/services/specs/default/kubernetes":      "services",
		"/registry/services/endpoints/default/kubernetes":  "endpoints",
		"/registry/stable.example.com/crontabs/default/a":  "crontabs.stable.example.com",
		"/registry/kleidi.beezy.dev/keyrings/cluster":      "keyrings.kleidi.beezy.dev",
		"/registry/apiregistration.k8s.io/apiservices/v1.": "apiservices.apiregistration.k8s.io",
		"/registry/ranges/serviceips":                      "ranges",
		"/registry/health":                                 "health",
		"/registry":                                        "",
		"/registry-2/secrets/default/a":                    "",
		"compact_rev_key":                                  "",
		"/bootstrap/0a1b":                                  "",
	} {
		folder, ok := resourceOf([]byte(key), DefaultPrefix)
		if got := resourceName(string(folder)); ok != (want != "") || got != want {
			t.Errorf("%s: %q, %v, want %q", key, got, ok, want)
		}
	}
}

// FuzzParseHeader: every value is counted, within the value's own bytes.
func FuzzParseHeader(f *testing.F) {
	for _, s := range []string{"", "k8s\x00x", "k8s:enc:aescbc:v1:key1:x", "k8s:enc:kms:v1:vault:x", string(encrypted("kleidi", "k1-abc"))} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, value []byte) {
		h := parseHeader(value)
		switch h.provider {
		case Identity, Unknown:
			if h.name != nil || h.id != nil {
				t.Errorf("%q has a name or a key", value)
			}
		case KMSv2:
			if len(h.name) == 0 || len(h.id) == 0 || len(h.name) > maxName || len(h.id) > maxName {
				t.Errorf("%q: %q, %q", value, h.name, h.id)
			}
		}
		if (h.provider == Identity) != !strings.HasPrefix(string(value), mark) {
			t.Errorf("%q is %s", value, h.provider)
		}
		if _, err := newTally(DefaultPrefix).kindOf(value, value); err != nil {
			t.Error(err)
		}
	})
}
