package keyring

import (
	"bytes"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
)

// FuzzParse: a keyring that parses encodes to the same bytes, and refusals are typed.
func FuzzParse(f *testing.F) {
	file := golden(f, "keyring.json")
	f.Add(file)
	f.Add(newKeyring(f, 1).Marshal())
	f.Add(golden2(f, "keyring.json"))
	f.Add(golden2(f, "shared.json"))
	f.Add(bytes.Replace(file, []byte(`,"mac"`), []byte(`,"MAC":"","mac"`), 1))
	f.Add([]byte("{\"body\":\"e30=\",\"mac\":\"\"}\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		u, err := Parse(b)
		if err != nil {
			wantRefusal(t, err, seal.CauseKeyringCorrupt)
			return
		}
		again, err := encode(envelope{u.body, u.mac, u.section, u.sectionMAC})
		if err != nil || !bytes.Equal(append(again, '\n'), b) {
			t.Errorf("%q is accepted, but written as %q", b, again)
		}
		body, err := encodeBody(u.doc)
		if err != nil || !bytes.Equal(body, u.body) {
			t.Errorf("body %q is accepted, but written as %q", u.body, body)
		}
		if u.Format() == 1 && len(u.Slots()) == 0 || u.Info().Revision != u.Revision() {
			t.Error("a keyring without slots or with two revisions is accepted")
		}
	})
}

// FuzzBody is FuzzParse for the body, which base64 hides from the fuzzer there.
func FuzzBody(f *testing.F) {
	u := must[*Untrusted](f)(Parse(golden(f, "keyring.json")))
	f.Add(u.body)
	f.Add([]byte(`{"format":1}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		doc, err := parseBody1(b)
		if err != nil {
			return
		}
		if again, err := encode(doc); err != nil || !bytes.Equal(again, b) {
			t.Errorf("%q is accepted, but written as %q", b, again)
		}
	})
}

// FuzzOpen: without the KEK nobody can change a keyring.
func FuzzOpen(f *testing.F) {
	file := golden(f, "keyring.json")
	want := must[*Untrusted](f)(Parse(file))
	two := golden2(f, "keyring.json")
	kek := newKEK(f, 0x81)
	f.Add(file)
	f.Add(two)
	f.Add(bytes.Replace(two, []byte("A"), []byte("B"), 1))
	f.Add(newKeyring(f, 0x81).Marshal())
	f.Add(bytes.Replace(file, []byte("A"), []byte("B"), 1))
	f.Fuzz(func(t *testing.T, b []byte) {
		u, err := Parse(b)
		if err != nil {
			return
		}
		if _, err := u.Open(kek, nil); err != nil {
			return
		}
		if !bytes.Equal(u.body, want.body) && !bytes.Equal(b, two) && !bytes.Equal(b, golden2(t, "shared.json")) && !bytes.Equal(b, newKeyring(t, 0x81).Marshal()) {
			t.Errorf("opens: %q", b)
		}
	})
}

// FuzzDecrypt: only encrypted seeds decrypt, and refusals are one of three errors.
func FuzzDecrypt(f *testing.F) {
	v := goldenVectors(f)
	u := must[*Untrusted](f)(Parse(golden(f, "keyring.json")))
	k := must[*Keyring](f)(u.Open(newKEK(f, 0x81), nil))
	good := map[string]string{
		string(unhex(f, v.SeedCiphertext)):        v.SeedPlaintext,
		string(unhex(f, v.RetiredSeedCiphertext)): v.RetiredSeedPlaintext,
	}
	for c := range good {
		f.Add(string(v.KeyID), []byte(c))
		f.Add(string(v.RetiredKeyID), []byte(c))
	}
	f.Add("", []byte{1})
	f.Fuzz(func(t *testing.T, id string, c []byte) {
		p, err := k.Decrypt(seal.KeyID(id), c)
		switch err {
		case nil:
			if want, ok := good[string(c)]; !ok || want != string(p) {
				t.Errorf("%x decrypts to %q", c, p)
			}
		case seal.ErrUnknownKey, seal.ErrMalformed, seal.ErrAuthentication:
			if p != nil {
				t.Error("a plaintext with an error")
			}
		default:
			t.Error(err)
		}
	})
}

// FuzzParseAnchor: an anchor that parses encodes to the same bytes.
func FuzzParseAnchor(f *testing.F) {
	file := golden(f, "anchor.json")
	f.Add(file)
	f.Add(bytes.Replace(file, []byte(`6`), []byte(`06`), 1))
	f.Add(bytes.Replace(file, []byte(`"revision"`), []byte(`"x":1,"revision"`), 1))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := ParseAnchor(b)
		if err != nil {
			wantRefusal(t, err, seal.CauseAnchor, "parse anchor")
			return
		}
		if again := p.Marshal(); !bytes.Equal(again, b) {
			t.Errorf("%q is accepted, but written as %q", b, again)
		}
	})
}
