package keys_test

import (
	"bytes"
	"crypto"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

// akFile is a kept attestation key as its JSON.
type akFile struct {
	Form    string `json:"form"`
	SRK     string `json:"srk"`
	Public  []byte `json:"public"`
	Private []byte `json:"private"`
}

// TestKeptAK: a kept attestation key is used again only if it belongs to this TPM's
// storage root key and has the template. Anything else is replaced by a new key, which
// is kept.
func TestKeptAK(t *testing.T) {
	n, other := newNode(t), newNode(t)
	path := filepath.Join(t.TempDir(), "ak.json")
	quote := func(n *node) []byte {
		t.Helper()
		q, err := keys.Quoter{Device: n.Device, AK: attest.AKFile(path)}.Quote(t.Context(), nil, []byte("nonce"), crypto.SHA256, []int{7})
		if err != nil {
			t.Fatal(err)
		}
		return q.AKPublic
	}
	read := func() (k akFile) {
		t.Helper()
		b, err := os.ReadFile(path)
		if err == nil {
			err = json.Unmarshal(b, &k)
		}
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	first := quote(n)
	if !bytes.Equal(quote(n), first) {
		t.Error("the attestation key was not kept")
	}
	kept := read()
	if bytes.Equal(quote(other), first) {
		t.Error("another TPM quotes with it")
	}
	foreign := read()
	template, err := tpm2.Unmarshal[tpm2.TPMTPublic](kept.Public)
	if err != nil {
		t.Fatal(err)
	}
	// made makes the TPM make a key that differs from the template, or has a password.
	made := func(password string, change func(*tpm2.TPMAObject)) akFile {
		public := *template
		public.Unique = tpm2.TPMUPublicID{}
		change(&public.ObjectAttributes)
		k := kept
		k.Public, k.Private = n.createKey(public, password)
		return k
	}
	movable := func(a *tpm2.TPMAObject) { a.FixedTPM, a.FixedParent = false, false }
	claims := made("", movable)
	changed, err := tpm2.Unmarshal[tpm2.TPMTPublic](claims.Public)
	if err != nil {
		t.Fatal(err)
	}
	changed.ObjectAttributes = template.ObjectAttributes
	claims.Public = tpm2.Marshal(changed)
	for name, k := range map[string]akFile{
		"no key":                           {},
		"another TPM's":                    foreign,
		"another TPM's, as this one's":     {kept.Form, kept.SRK, foreign.Public, foreign.Private},
		"another private part":             {kept.Form, kept.SRK, kept.Public, foreign.Private},
		"another public part":              {kept.Form, kept.SRK, foreign.Public, kept.Private},
		"another form":                     {"attestation-key-v2", kept.SRK, kept.Public, kept.Private},
		"a byte behind the public part":    {kept.Form, kept.SRK, append(bytes.Clone(kept.Public), 0), kept.Private},
		"signs what its user likes":        made("", func(a *tpm2.TPMAObject) { a.Restricted = false }),
		"its user may know the key":        made("", movable),
		"its user may know, and denies it": claims,
		"has a password that nobody knows": made("secret", func(*tpm2.TPMAObject) {}),
	} {
		b, err := json.Marshal(k)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		now := quote(n)
		if bytes.Equal(now, k.Public) {
			t.Errorf("%s: it quotes", name)
		}
		if !bytes.Equal(quote(n), now) {
			t.Errorf("%s: the new key was not kept", name)
		}
	}
}

// TestQuoteWithoutAFile: if no key can be kept, each quote has a fresh one.
func TestQuoteWithoutAFile(t *testing.T) {
	n := newNode(t)
	q := keys.Quoter{Device: n.Device, AK: attest.AKFile(filepath.Join(t.TempDir(), "missing", "ak.json"))}
	var keys [2][]byte
	for i := range keys {
		quote, err := q.Quote(t.Context(), nil, []byte("nonce"), crypto.SHA256, []int{7})
		if err != nil {
			t.Fatal(err)
		}
		keys[i] = quote.AKPublic
	}
	if bytes.Equal(keys[0], keys[1]) {
		t.Error("a key was kept")
	}
}

// createKey makes the TPM create a key below its storage root key.
func (n *node) createKey(public tpm2.TPMTPublic, password string) (pub, priv []byte) {
	n.Helper()
	n.Must(func(tp transport.TPM) error {
		return keys.WithSRK(tp, keys.Owner{}, nil, func(srk *keys.SRK) error {
			r, err := tpm2.Create{
				ParentHandle: tpm2.AuthHandle{Handle: srk.Handle, Name: srk.Name, Auth: tpm2.PasswordAuth(nil)},
				InSensitive:  tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{UserAuth: tpm2.TPM2BAuth{Buffer: []byte(password)}}},
				InPublic:     tpm2.New2B(public),
			}.Execute(tp)
			if err == nil {
				pub, priv = r.OutPublic.Bytes(), r.OutPrivate.Buffer
			}
			return err
		})
	})
	return pub, priv
}
