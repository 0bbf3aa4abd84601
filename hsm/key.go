//go:build cgo

package hsm

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"

	"github.com/miekg/pkcs11"

	"github.com/beezy-dev/kleidi/seal"
)

// key is a key of the token.
type key struct {
	handle pkcs11.ObjectHandle
	class  string
	name   keyName
	public *rsa.PublicKey // RSA
}

func attribute(typ uint, value any) *pkcs11.Attribute { return pkcs11.NewAttribute(typ, value) }

// classes are the kinds of keys that wrap, in the order in which they are looked for.
var classes = []struct {
	name        string
	class, typ  uint
	description string
}{
	{classSecret, pkcs11.CKO_SECRET_KEY, pkcs11.CKK_AES, "AES"},
	{classPrivate, pkcs11.CKO_PRIVATE_KEY, pkcs11.CKK_RSA, "RSA"},
}

// findKey finds the one key that is meant, of a class if one is given.
func (s *session) findKey(want *keyMatch, class string) (*key, error) {
	for _, c := range classes {
		if want.class != "" && want.class != c.name || class != "" && class != c.name {
			continue
		}
		handles, err := s.findObjects(want, attribute(pkcs11.CKA_CLASS, c.class), attribute(pkcs11.CKA_KEY_TYPE, c.typ))
		if err != nil {
			return nil, err
		}
		switch len(handles) {
		case 0:
			continue
		case 1:
			return s.readKey(handles[0], c.name)
		}
		return nil, seal.Errorf(seal.CauseUnavailable, "name the key with id=… and object=… in pkcs11.uri so that one matches",
			"token %v has several %s keys that match %v", nameOf(s.token), c.description, want)
	}
	return nil, &seal.Error{Cause: seal.CauseKeyMissing, Err: fmt.Errorf("token %v: %w: %v", nameOf(s.token), ErrNoKey, want),
		Hint: "if it was deleted, restore it from the token's backup, or unlock with another slot and kleidi slot remove this one; a new key is made by kleidi slot add pkcs11 --generate-key, or by kleidi init --generate-key where there is no keyring yet"}
}

func (k keyMatch) String() string {
	var parts []string
	if k.class != "" {
		parts = append(parts, "type="+k.class)
	}
	if k.label != "" {
		parts = append(parts, fmt.Sprintf("label %q", trim(k.label)))
	}
	if len(k.id) > 0 {
		parts = append(parts, fmt.Sprintf("id %x", k.id))
	}
	return strings.Join(parts, ", ")
}

// findObjects returns the token objects that match, at most a few.
func (s *session) findObjects(want *keyMatch, template ...*pkcs11.Attribute) ([]pkcs11.ObjectHandle, error) {
	template = append(template, attribute(pkcs11.CKA_TOKEN, true))
	if want.label != "" {
		template = append(template, attribute(pkcs11.CKA_LABEL, want.label))
	}
	if len(want.id) > 0 {
		template = append(template, attribute(pkcs11.CKA_ID, want.id))
	}
	if err := s.FindObjectsInit(s.h, template); err != nil {
		return nil, fmt.Errorf("C_FindObjectsInit: %w", err)
	}
	handles, _, err := s.FindObjects(s.h, 4)
	if err != nil {
		err = fmt.Errorf("C_FindObjects: %w", err)
	}
	if final := s.FindObjectsFinal(s.h); final != nil && err == nil {
		err = fmt.Errorf("C_FindObjectsFinal: %w", final)
	}
	return handles, err
}

// read returns an attribute, or nil where the token doesn't have or show it.
func (s *session) read(o pkcs11.ObjectHandle, typ uint) []byte {
	a, err := s.GetAttributeValue(s.h, o, []*pkcs11.Attribute{attribute(typ, nil)})
	if err != nil || len(a) != 1 {
		return nil
	}
	return a[0].Value
}

func (s *session) readKey(h pkcs11.ObjectHandle, class string) (*key, error) {
	k := &key{handle: h, class: class, name: keyName{Label: trim(string(s.read(h, pkcs11.CKA_LABEL))), ID: s.read(h, pkcs11.CKA_ID)}}
	if len(k.name.Label) > maxKeyLabel || len(k.name.ID) > maxKeyID {
		return nil, seal.Errorf(seal.CauseUnavailable, "give the key a shorter label and id", "token %v: the key's label or id is too long", nameOf(s.token))
	}
	if class != classPrivate {
		return k, nil
	}
	public, err := s.readPublic(k)
	if err != nil {
		return nil, err
	}
	return k, k.setPublic(public)
}

// setPublic names an RSA key by its public part.
func (k *key) setPublic(public *rsa.PublicKey) error {
	digest, err := publicDigest(public)
	k.public, k.name.Public = public, digest
	return err
}

// readPublic reads the public part of an RSA key: from the key itself, or from
// the public key object beside it, which is what tokens have who don't keep
// the exponent with the private key.
func (s *session) readPublic(k *key) (*rsa.PublicKey, error) {
	n, e := s.read(k.handle, pkcs11.CKA_MODULUS), s.read(k.handle, pkcs11.CKA_PUBLIC_EXPONENT)
	if len(n) == 0 || len(e) == 0 {
		beside, err := s.findObjects(&keyMatch{label: k.name.Label, id: k.name.ID}, attribute(pkcs11.CKA_CLASS, pkcs11.CKO_PUBLIC_KEY), attribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_RSA))
		if err != nil {
			return nil, err
		}
		if len(beside) == 1 {
			n, e = s.read(beside[0], pkcs11.CKA_MODULUS), s.read(beside[0], pkcs11.CKA_PUBLIC_EXPONENT)
		}
	}
	exponent := new(big.Int).SetBytes(e)
	if len(n) == 0 || exponent.BitLen() > 31 {
		return nil, seal.Errorf(seal.CauseUnavailable, "store the public key object on the token too, with the same label and id", "token %v does not show the public part of the RSA key", nameOf(s.token))
	}
	return &rsa.PublicKey{N: new(big.Int).SetBytes(n), E: int(exponent.Int64())}, nil
}

// may reports whether the key allows a mechanism. What a token doesn't say is
// left to the operation itself.
func (s *session) may(k *key, m *mechanism) bool {
	for _, permission := range m.needs {
		if v := s.read(k.handle, permission); len(v) == 1 && v[0] == 0 {
			return false
		}
	}
	list := s.read(k.handle, pkcs11.CKA_ALLOWED_MECHANISMS)
	if len(list) < ulong {
		return true // no list, no limit
	}
	for one := range slices.Chunk(list, ulong) {
		if len(one) == ulong && binary.NativeEndian.Uint64(one) == uint64(m.ckm) {
			return true
		}
	}
	return false
}

// ulong is the size of a CK_ULONG on the 64-bit platforms that kleidi runs on, in bytes.
const ulong = 8

// Templates of keys.
const keySize = 32 // bytes, AES-256

// generateKey makes a key that never leaves the token, and refuses where one that matches is there.
func (s *session) generateKey(want *keyMatch) (*key, error) {
	if want.class == classPrivate {
		return nil, errors.New("generate a key: only AES keys are generated; leave type=private out of pkcs11.uri")
	}
	if want.label == "" {
		return nil, errors.New("generate a key: it needs a label; add object=LABEL to pkcs11.uri")
	}
	old, err := s.findObjects(want, attribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY))
	if err != nil {
		return nil, err
	}
	if len(old) > 0 {
		return nil, seal.Errorf(seal.CauseUnavailable, "leave --generate-key out to use that key, or choose another label",
			"token %v has a key with %v already, and no key is overwritten", nameOf(s.token), want)
	}
	id := want.id
	if len(id) == 0 {
		id = make([]byte, 16)
		rand.Read(id)
	}
	h, err := s.GenerateKey(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, s.template(want.label, id))
	if err != nil {
		return nil, fmt.Errorf("C_GenerateKey: %w", err)
	}
	k, err := s.checkGenerated(h, want)
	if err != nil {
		_ = s.DestroyObject(s.h, h) // it has wrapped nothing yet
		return nil, err
	}
	return k, nil
}

// template is what a generated key is: for encrypting alone where the token can do that.
func (s *session) template(label string, id []byte) []*pkcs11.Attribute {
	wraps := true
	for i := range mechanisms {
		if m := &mechanisms[i]; m.class == classSecret && slices.Contains(m.needs, pkcs11.CKA_ENCRYPT) && s.offers(m) {
			wraps = false
		}
	}
	return []*pkcs11.Attribute{
		attribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), attribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_AES), attribute(pkcs11.CKA_VALUE_LEN, keySize),
		attribute(pkcs11.CKA_LABEL, label), attribute(pkcs11.CKA_ID, id),
		attribute(pkcs11.CKA_TOKEN, true), attribute(pkcs11.CKA_PRIVATE, true), attribute(pkcs11.CKA_SENSITIVE, true), attribute(pkcs11.CKA_EXTRACTABLE, false),
		attribute(pkcs11.CKA_ENCRYPT, !wraps), attribute(pkcs11.CKA_DECRYPT, !wraps), attribute(pkcs11.CKA_WRAP, wraps), attribute(pkcs11.CKA_UNWRAP, wraps),
	}
}

// checkGenerated sees that the token did as it was told, and that nobody else
// made a key of the same name meanwhile.
func (s *session) checkGenerated(h pkcs11.ObjectHandle, want *keyMatch) (*key, error) {
	if !bytes.Equal(s.read(h, pkcs11.CKA_SENSITIVE), []byte{1}) || !bytes.Equal(s.read(h, pkcs11.CKA_EXTRACTABLE), []byte{0}) {
		return nil, seal.Errorf(seal.CauseUnavailable, "have the token's administrator allow sensitive keys that can't be extracted", "token %v made a key that could leave it", nameOf(s.token))
	}
	same, err := s.findObjects(want, attribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY))
	if err != nil {
		return nil, err
	}
	if len(same) != 1 {
		return nil, seal.Errorf(seal.CauseUnavailable, "see what made it; then leave --generate-key out to use that key", "token %v got another key with %v at the same time", nameOf(s.token), want)
	}
	return s.readKey(h, classSecret)
}
