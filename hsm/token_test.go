//go:build cgo

package hsm

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/pkcs11"

	"github.com/beezy-dev/kleidi/hsm/internal/cryptoki"
	"github.com/beezy-dev/kleidi/hsm/internal/keyslot"
	"github.com/beezy-dev/kleidi/seal"
)

// odd is a real token that deviates in the ways that a test sets.
type odd struct {
	cryptoki.Functions
	template  func([]*pkcs11.Attribute) []*pkcs11.Attribute // of C_GenerateKey
	twice     bool                                          // C_GenerateKey makes two keys
	hides     []uint                                        // attributes that it doesn't show
	shows     map[uint][]byte                               // attributes that it shows instead
	lacks     []uint                                        // mechanisms that it doesn't offer
	encrypted func([]byte) []byte
	destroyed int
}

func (o *odd) GenerateKey(h pkcs11.SessionHandle, m []*pkcs11.Mechanism, a []*pkcs11.Attribute) (pkcs11.ObjectHandle, error) {
	if o.template != nil {
		a = o.template(a)
	}
	if o.twice {
		if _, err := o.Functions.GenerateKey(h, m, a); err != nil {
			return 0, err
		}
	}
	return o.Functions.GenerateKey(h, m, a)
}

func (o *odd) GetAttributeValue(h pkcs11.SessionHandle, k pkcs11.ObjectHandle, a []*pkcs11.Attribute) ([]*pkcs11.Attribute, error) {
	if v, ok := o.shows[a[0].Type]; ok {
		return []*pkcs11.Attribute{attribute(a[0].Type, v)}, nil
	}
	if slices.Contains(o.hides, a[0].Type) {
		return nil, pkcs11.Error(pkcs11.CKR_ATTRIBUTE_TYPE_INVALID)
	}
	return o.Functions.GetAttributeValue(h, k, a)
}

func (o *odd) GetMechanismInfo(slot uint, m []*pkcs11.Mechanism) (pkcs11.MechanismInfo, error) {
	if slices.Contains(o.lacks, m[0].Mechanism) {
		return pkcs11.MechanismInfo{}, pkcs11.Error(pkcs11.CKR_MECHANISM_INVALID)
	}
	return o.Functions.GetMechanismInfo(slot, m)
}

func (o *odd) Encrypt(h pkcs11.SessionHandle, b []byte) ([]byte, error) {
	c, err := o.Functions.Encrypt(h, b)
	if err == nil && o.encrypted != nil {
		c = o.encrypted(c)
	}
	return c, err
}

func (o *odd) DestroyObject(h pkcs11.SessionHandle, k pkcs11.ObjectHandle) error {
	o.destroyed++
	return o.Functions.DestroyObject(h, k)
}

// with makes a session use an odd token.
func (o *odd) with(s *session) *session {
	o.Functions = s.Functions
	s.Functions = o
	return s
}

// setting returns a template with another value of an attribute.
func setting(typ uint, value bool) func([]*pkcs11.Attribute) []*pkcs11.Attribute {
	return func(a []*pkcs11.Attribute) []*pkcs11.Attribute {
		a = slices.DeleteFunc(slices.Clone(a), func(a *pkcs11.Attribute) bool { return a.Type == typ })
		return append(a, attribute(typ, value))
	}
}

// TestKeyThatCouldLeave: a generated key is refused and destroyed if its attributes
// differ from the template, or if another key has the same name.
func TestKeyThatCouldLeave(t *testing.T) {
	b := softHSM(t)
	for name, row := range map[string]struct {
		o    odd
		says string
		left int
	}{
		"extractable":             {odd{template: setting(pkcs11.CKA_EXTRACTABLE, true)}, "made a key that could leave it", 0},
		"not sensitive":           {odd{template: setting(pkcs11.CKA_SENSITIVE, false)}, "made a key that could leave it", 0},
		"doesn't say extractable": {odd{hides: []uint{pkcs11.CKA_EXTRACTABLE}}, "made a key that could leave it", 0},
		"doesn't say sensitive":   {odd{hides: []uint{pkcs11.CKA_SENSITIVE}}, "made a key that could leave it", 0},
		"two at the same time":    {odd{twice: true}, "got another key with label", 1},
		"a label that is long":    {odd{shows: map[uint][]byte{pkcs11.CKA_LABEL: bytes.Repeat([]byte("x"), keyslot.MaxKeyLabel+1)}}, "label or id is too long", 0},
		"an ID that is long":      {odd{shows: map[uint][]byte{pkcs11.CKA_ID: make([]byte, keyslot.MaxKeyID+1)}}, "label or id is too long", 0},
	} {
		inSession(t, newWrapper(t, b.config(t, 0, name)), func(s *session) {
			_, err := row.o.with(s).generateKey(&keyMatch{label: name})
			checkFault(t, err, seal.CauseUnavailable, row.says)
			if left := must[[]pkcs11.ObjectHandle](t)(s.findObjects(&keyMatch{label: name})); len(left) != row.left {
				t.Errorf("%s: %d keys are left, want %d", name, len(left), row.left)
			}
		})
	}
}

// TestTemplate: a key may wrap and unwrap only on a token that can't encrypt with it.
func TestTemplate(t *testing.T) {
	b := softHSM(t)
	for name, row := range map[string]struct {
		lacks []uint
		wraps bool
	}{
		"encrypts":   {nil, false},
		"wraps only": {[]uint{pkcs11.CKM_AES_GCM, ckmKWP}, true},
		"kwp":        {[]uint{pkcs11.CKM_AES_GCM}, true}, // SoftHSM has no CKM_AES_KEY_WRAP_KWP that encrypts
	} {
		inSession(t, newWrapper(t, b.config(t, 0, name)), func(s *session) {
			got := map[uint]bool{}
			for _, a := range (&odd{lacks: row.lacks}).with(s).template("x", []byte{1}) {
				switch a.Type {
				case pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT, pkcs11.CKA_WRAP, pkcs11.CKA_UNWRAP:
					got[a.Type] = a.Value[0] == 1
				}
			}
			want := map[uint]bool{pkcs11.CKA_ENCRYPT: !row.wraps, pkcs11.CKA_DECRYPT: !row.wraps, pkcs11.CKA_WRAP: row.wraps, pkcs11.CKA_UNWRAP: row.wraps}
			if !maps.Equal(got, want) {
				t.Errorf("%s: %v, want %v", name, got, want)
			}
		})
	}
}

// TestChoice: a mechanism must fit the class of the key, the token and the permissions.
func TestChoice(t *testing.T) {
	b := softHSM(t)
	w := b.generated(t, 0, "kek")
	b.aesKey(t, w, "both", attribute(pkcs11.CKA_WRAP, true), attribute(pkcs11.CKA_UNWRAP, true))
	for name, row := range map[string]struct {
		key   string
		class string
		only  []string
		lacks []uint
		shows map[uint][]byte
		want  string
	}{
		"first":           {"kek", keyslot.ClassSecret, nil, nil, nil, keyslot.MechGCM},
		"the one allowed": {"both", keyslot.ClassSecret, []string{keyslot.MechWrapPad}, nil, nil, keyslot.MechWrapPad},
		"not offered":     {"both", keyslot.ClassSecret, nil, []uint{pkcs11.CKM_AES_GCM, ckmKWP}, nil, keyslot.MechWrapPad},
		"not permitted":   {"kek", keyslot.ClassSecret, []string{keyslot.MechWrapPad}, nil, nil, ""},
		"of an RSA key":   {"kek", keyslot.ClassSecret, []string{keyslot.MechOAEP}, nil, nil, ""},
		"of an AES key":   {"kek", keyslot.ClassPrivate, []string{keyslot.MechGCM}, nil, nil, ""},
		"not listed":      {"kek", keyslot.ClassSecret, nil, nil, map[uint][]byte{pkcs11.CKA_ALLOWED_MECHANISMS: {1, 0, 0, 0, 0, 0, 0, 0}}, ""},
		"a torn list":     {"kek", keyslot.ClassSecret, nil, nil, map[uint][]byte{pkcs11.CKA_ALLOWED_MECHANISMS: {1, 0, 0, 0, 0, 0, 0, 0, 0x87}}, ""},
	} {
		inSession(t, w, func(s *session) {
			k := must[*key](t)(s.findKey(&keyMatch{label: row.key}, ""))
			k.class = row.class
			m, err := (&odd{lacks: row.lacks, shows: row.shows}).with(s).choose(k, row.only)
			switch {
			case row.want == "" && !errors.Is(err, ErrNotPermitted):
				t.Errorf("%s: %v, %v", name, m, err)
			case row.want != "" && (err != nil || m.name != row.want):
				t.Errorf("%s: %v, %v", name, m, err)
			}
		})
	}
}

// TestOwnFormOfGCM: a token whose AES-GCM isn't the standard's makes no keyslot.
func TestOwnFormOfGCM(t *testing.T) {
	b := softHSM(t)
	w := b.generated(t, 0, "kek")
	for name, row := range map[string]struct {
		encrypted func([]byte) []byte
		iv        []byte
		good      bool
	}{
		"standard":      {nil, []byte("an IV, random"), true},
		"short":         {func(c []byte) []byte { return c[:len(c)-4] }, []byte("an IV, random"), false},
		"its IV beside": {func(c []byte) []byte { return append(c, 1) }, []byte("an IV, random"), false},
		"zero IV":       {nil, make([]byte, keyslot.MinIV), false},
	} {
		inSession(t, w, func(s *session) {
			k := must[*key](t)(s.findKey(&w.target.key, ""))
			err := sealGCMWith((&odd{encrypted: row.encrypted}).with(s), k, mechanismNamed(keyslot.MechGCM), make([]byte, seal.KEKSize), &keyslot.Data{}, row.iv)
			if (err == nil) != row.good || !row.good && !strings.Contains(err.Error(), "not the form of the standard") {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
}

// TestCarriers: the KEK isn't left as an object of the session.
func TestCarriers(t *testing.T) {
	b := softHSM(t)
	w := b.generated(t, 0, "kek")
	b.aesKey(t, w, "both", attribute(pkcs11.CKA_WRAP, true), attribute(pkcs11.CKA_UNWRAP, true))
	inSession(t, w, func(s *session) {
		k := must[*key](t)(s.findKey(&keyMatch{label: "both"}, ""))
		m, o, d := mechanismNamed(keyslot.MechWrapPad), &odd{}, &keyslot.Data{}
		o.with(s)
		kek := bytes.Repeat([]byte{7}, seal.KEKSize)
		ok(t, m.seal(s, k, m, kek, d))
		if got := must[[]byte](t)(m.open(s, k, m, d)); !bytes.Equal(got, kek) || o.destroyed != 2 {
			t.Errorf("it opens as %x; %d objects destroyed, want 2", got, o.destroyed)
		}
		o.hides = []uint{pkcs11.CKA_VALUE}
		if got, err := m.open(s, k, m, d); err == nil || got != nil {
			t.Errorf("a value that the token hides: %x, %v", got, err)
		}
	})
}

// TestPublicPart: the public part of an RSA key is read from the key itself, or else from
// the only public key object beside it.
func TestPublicPart(t *testing.T) {
	b := softHSM(t)
	w := newWrapper(t, b.config(t, 0, "rsa"))
	b.rsaKey(t, w, "rsa")
	for name, row := range map[string]struct {
		hides []uint // of the private key
		shows map[uint][]byte
		says  string
	}{
		"its own":     {nil, nil, ""},
		"beside, e":   {[]uint{pkcs11.CKA_PUBLIC_EXPONENT}, nil, ""},
		"beside, n":   {[]uint{pkcs11.CKA_MODULUS}, nil, ""},
		"no modulus":  {nil, map[uint][]byte{pkcs11.CKA_MODULUS: nil}, "does not show the public part"},
		"a huge e":    {nil, map[uint][]byte{pkcs11.CKA_PUBLIC_EXPONENT: {1, 0, 0, 0, 1}}, "does not show the public part"},
		"an even e":   {nil, map[uint][]byte{pkcs11.CKA_PUBLIC_EXPONENT: {2}}, "exponent 2"},
		"a small key": {nil, map[uint][]byte{pkcs11.CKA_MODULUS: bytes.Repeat([]byte{0xff}, 128)}, "1024 bits"},
	} {
		inSession(t, w, func(s *session) {
			private := must[[]pkcs11.ObjectHandle](t)(s.findObjects(&keyMatch{label: "rsa"}, attribute(pkcs11.CKA_CLASS, pkcs11.CKO_PRIVATE_KEY)))
			want := must[*key](t)(s.findKey(&keyMatch{label: "rsa"}, keyslot.ClassPrivate)).public
			hidden := &hiding{odd: odd{hides: row.hides, shows: row.shows}, of: private[0]}
			hidden.Functions, s.Functions = s.Functions, hidden
			k, err := s.readKey(private[0], keyslot.ClassPrivate)
			switch {
			case row.says == "" && (err != nil || !k.public.Equal(want) || len(k.name.Public) != 32):
				t.Errorf("%s: %v", name, err)
			case row.says != "" && (err == nil || !strings.Contains(err.Error(), row.says)):
				t.Errorf("%s: %v", name, err)
			}
		})
	}
}

// hiding hides attributes of one object only.
type hiding struct {
	odd
	of pkcs11.ObjectHandle
}

func (o *hiding) GetAttributeValue(h pkcs11.SessionHandle, k pkcs11.ObjectHandle, a []*pkcs11.Attribute) ([]*pkcs11.Attribute, error) {
	if k != o.of && o.shows == nil {
		return o.Functions.GetAttributeValue(h, k, a)
	}
	return o.odd.GetAttributeValue(h, k, a)
}

// TestConfigLimits: each limit of a configuration, over it.
func TestConfigLimits(t *testing.T) {
	text := func(n int) string { return strings.Repeat("x", n) }
	slot := uint(3)
	for name, row := range map[string]struct {
		change func(*Config)
		says   string
	}{
		"token serial": {func(c *Config) { c.TokenSerial = text(keyslot.MaxTokenSerial + 1) }, "a token's label has at most"},
		"token label":  {func(c *Config) { c.TokenLabel = text(keyslot.MaxTokenLabel + 1) }, "a token's label has at most"},
		"key label":    {func(c *Config) { c.KeyLabel = text(keyslot.MaxKeyLabel + 1) }, "a key's label has at most"},
		"key id":       {func(c *Config) { c.KeyID = make([]byte, keyslot.MaxKeyID+1) }, "a key's label has at most"},
		"timeout":      {func(c *Config) { c.Timeout = -time.Second }, "is below zero"},
		"small key": {func(c *Config) {
			c.PublicKey = &rsa.PublicKey{N: must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 1024)).N, E: 65537}
		}, "publicKey: the RSA key has 1024 bits"},
	} {
		c := Config{Module: "/lib/module.so", KeyLabel: "kek"}
		row.change(&c)
		if _, err := c.resolve(); err == nil || !strings.Contains(err.Error(), row.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for uri, want := range map[string]uint{"pkcs11:object=kek;slot-id=7": 7, "pkcs11:object=kek": 3} {
		c := Config{Module: "/lib/module.so", URI: uri}
		if want == slot {
			c.SlotID = &slot
		}
		if r := must[*target](t)(c.resolve()); r.token.SlotID == nil || *r.token.SlotID != want {
			t.Errorf("%s: %v, want %d", uri, r.token.SlotID, want)
		}
	}
}

// TestDescribe: what an operator reads about a keyslot and a key.
func TestDescribe(t *testing.T) {
	for want, key := range map[string]keyslot.KeyName{`key "kek" of`: {Label: "kek", ID: keyslot.HexID{1}}, "key 01ff of": {ID: keyslot.HexID{1, 0xff}}} {
		d := keyslot.Data{Form: keyslot.Form1, Mechanism: keyslot.MechKWP, Key: key, Ciphertext: make([]byte, 40)}
		if got := Describe(must[seal.Slot](t)(d.Slot())); !strings.HasPrefix(got, want) {
			t.Errorf("%q, want %s", got, want)
		}
	}
	if got := Describe(seal.Slot{Type: seal.TypePKCS11, Data: []byte("{}")}); got != "unreadable" {
		t.Errorf("%q", got)
	}
	if got := fmt.Sprint(keyMatch{label: "kek", id: []byte{1, 2}, class: keyslot.ClassSecret}); got != `type=secret-key, label "kek", id 0102` {
		t.Error(got)
	}
}
