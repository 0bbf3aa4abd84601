//go:build cgo

package hsm

import (
	"crypto/rsa"
	"encoding/binary"
	"fmt"
	"math/big"
	"slices"
	"strings"

	"github.com/miekg/pkcs11"

	"github.com/beezy-dev/kleidi/hsm/internal/keyslot"
	"github.com/beezy-dev/kleidi/seal"
)

// key is a key on the token.
type key struct {
	handle pkcs11.ObjectHandle
	class  string
	name   keyslot.KeyName
	public *rsa.PublicKey // of an RSA key
}

// classes are the classes of keys that can wrap, in the order of the search.
var classes = []struct {
	name        string
	class, typ  uint
	description string
}{
	{keyslot.ClassSecret, pkcs11.CKO_SECRET_KEY, pkcs11.CKK_AES, "AES"},
	{keyslot.ClassPrivate, pkcs11.CKO_PRIVATE_KEY, pkcs11.CKK_RSA, "RSA"},
}

// findKey returns the one key that matches. If class is not empty, the key must be of
// that class.
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
			"token %v has several %s keys that match %v", s.Name(), c.description, want)
	}
	return nil, &seal.Error{Cause: seal.CauseKeyMissing, Err: fmt.Errorf("token %v: %w: %v", s.Name(), ErrNoKey, want),
		Hint: "if it was deleted, restore it from the token's backup, or unlock with another keyslot and run kleidi slot remove NAME for this one; to make a new key, run kleidi slot add pkcs11 --generate-key, or kleidi init --generate-key if there is no keyring yet"}
}

func (k keyMatch) String() string {
	var parts []string
	if k.class != "" {
		parts = append(parts, "type="+k.class)
	}
	if k.label != "" {
		parts = append(parts, fmt.Sprintf("label %q", keyslot.Trim(k.label)))
	}
	if len(k.id) > 0 {
		parts = append(parts, fmt.Sprintf("id %x", k.id))
	}
	return strings.Join(parts, ", ")
}

func (s *session) readKey(h pkcs11.ObjectHandle, class string) (*key, error) {
	k := &key{handle: h, class: class, name: keyslot.KeyName{Label: keyslot.Trim(string(s.read(h, pkcs11.CKA_LABEL))), ID: s.read(h, pkcs11.CKA_ID)}}
	if len(k.name.Label) > keyslot.MaxKeyLabel || len(k.name.ID) > keyslot.MaxKeyID {
		return nil, seal.Errorf(seal.CauseUnavailable, "give the key a shorter label and id", "token %v: the key's label or id is too long", s.Name())
	}
	if class != keyslot.ClassPrivate {
		return k, nil
	}
	public, err := s.readPublic(k)
	if err != nil {
		return nil, err
	}
	return k, k.setPublic(public)
}

// setPublic sets the public part of an RSA key, by which the key is named.
func (k *key) setPublic(public *rsa.PublicKey) error {
	digest, err := keyslot.PublicDigest(public)
	k.public, k.name.Public = public, digest
	return err
}

// readPublic reads the public part of an RSA key: from the key itself, or from the
// public key object beside it. Some tokens don't keep the exponent with the private
// key.
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
		return nil, seal.Errorf(seal.CauseUnavailable, "store the public key object on the token too, with the same label and id", "token %v does not show the public part of the RSA key", s.Name())
	}
	return &rsa.PublicKey{N: new(big.Int).SetBytes(n), E: int(exponent.Int64())}, nil
}

// allows reports whether the key allows the mechanism. If the token doesn't say so, the
// operation itself shows it.
func (s *session) allows(k *key, m *mechanism) bool {
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
