//go:build cgo

package hsm

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"

	"github.com/miekg/pkcs11"

	"github.com/beezy-dev/kleidi/hsm/internal/keyslot"
	"github.com/beezy-dev/kleidi/seal"
)

// ckmKWP is CKM_AES_KEY_WRAP_KWP (PKCS#11 v3.0; RFC 5649).
const ckmKWP = 0x210b

// gcmContext is the additional data of aes-gcm keyslots. A ciphertext that the same key
// made for another purpose does not open as a keyslot.
var gcmContext = []byte("kleidi pkcs11 slot v1")

const gcmTag = 16 // bytes

// mechanism is a way to wrap with a key on a token.
type mechanism struct {
	name  string
	ckm   uint
	class string
	offer uint   // CKF_ flags that C_GetMechanismInfo must show
	needs []uint // CKA_ permissions that the key must have
	// seal wraps kek and puts the result into d.
	seal func(s *session, k *key, m *mechanism, kek []byte, d *keyslot.Data) error
	// open returns the KEK. The caller clears the whole capacity of the result.
	open func(s *session, k *key, m *mechanism, d *keyslot.Data) ([]byte, error)
}

// mechanisms are in the order of preference: first the mechanism that authenticates a
// context, then those that do not make the KEK an object on the token.
var mechanisms = []mechanism{
	{keyslot.MechGCM, pkcs11.CKM_AES_GCM, keyslot.ClassSecret, pkcs11.CKF_ENCRYPT | pkcs11.CKF_DECRYPT, []uint{pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT}, sealGCM, openGCM},
	{keyslot.MechKWP, ckmKWP, keyslot.ClassSecret, pkcs11.CKF_ENCRYPT | pkcs11.CKF_DECRYPT, []uint{pkcs11.CKA_ENCRYPT, pkcs11.CKA_DECRYPT}, sealEncrypt, openDecrypt},
	{keyslot.MechKWPKey, ckmKWP, keyslot.ClassSecret, pkcs11.CKF_WRAP | pkcs11.CKF_UNWRAP, []uint{pkcs11.CKA_WRAP, pkcs11.CKA_UNWRAP}, sealWrapKey, openUnwrapKey},
	{keyslot.MechWrapPad, pkcs11.CKM_AES_KEY_WRAP_PAD, keyslot.ClassSecret, pkcs11.CKF_WRAP | pkcs11.CKF_UNWRAP, []uint{pkcs11.CKA_WRAP, pkcs11.CKA_UNWRAP}, sealWrapKey, openUnwrapKey},
	{keyslot.MechOAEP, pkcs11.CKM_RSA_PKCS_OAEP, keyslot.ClassPrivate, pkcs11.CKF_DECRYPT, []uint{pkcs11.CKA_DECRYPT}, sealOAEP, openDecrypt},
}

func mechanismNamed(name string) *mechanism {
	i := slices.IndexFunc(mechanisms, func(m mechanism) bool { return m.name == name })
	return &mechanisms[i] // i >= 0, because keyslot.Data.check accepts these names only
}

func (m *mechanism) parameter() []*pkcs11.Mechanism {
	if m.ckm == pkcs11.CKM_RSA_PKCS_OAEP {
		return []*pkcs11.Mechanism{pkcs11.NewMechanism(m.ckm, pkcs11.NewOAEPParams(pkcs11.CKM_SHA256, pkcs11.CKG_MGF1_SHA256, pkcs11.CKZ_DATA_SPECIFIED, nil))}
	}
	return []*pkcs11.Mechanism{pkcs11.NewMechanism(m.ckm, nil)}
}

// choose returns the first mechanism that the token offers and the key allows. If only
// is not empty, it names the mechanisms to choose from.
func (s *session) choose(k *key, only []string) (*mechanism, error) {
	for i := range mechanisms {
		m := &mechanisms[i]
		if m.class == k.class && (len(only) == 0 || slices.Contains(only, m.name)) && s.offers(m) && s.allows(k, m) {
			return m, nil
		}
	}
	return nil, &seal.Error{Cause: seal.CauseUnavailable, Err: fmt.Errorf("token %v: %w", s.Name(), ErrNotPermitted),
		Hint: "use a key with CKA_ENCRYPT and CKA_DECRYPT (or CKA_WRAP and CKA_UNWRAP) and a token with AES-GCM, AES key wrap with padding, or RSA-OAEP with SHA-256"}
}

// sealGCM gives the token a random IV. Some tokens use it. Others use an IV of their own,
// and some of these refuse an IV that is not zero.
func sealGCM(s *session, k *key, m *mechanism, kek []byte, d *keyslot.Data) error {
	random := make([]byte, keyslot.MinIV)
	rand.Read(random)
	err := sealGCMWith(s, k, m, kek, d, random)
	if code, ok := errors.AsType[pkcs11.Error](err); ok && (code == pkcs11.CKR_MECHANISM_PARAM_INVALID || code == pkcs11.CKR_ARGUMENTS_BAD || code == pkcs11.CKR_DATA_INVALID) {
		return sealGCMWith(s, k, m, kek, d, make([]byte, keyslot.MinIV))
	}
	return err
}

func sealGCMWith(s *session, k *key, m *mechanism, kek []byte, d *keyslot.Data, iv []byte) error {
	params := pkcs11.NewGCMParams(iv, gcmContext, 8*gcmTag)
	defer params.Free()
	if err := s.EncryptInit(s.Handle, []*pkcs11.Mechanism{pkcs11.NewMechanism(m.ckm, params)}, k.handle); err != nil {
		return fmt.Errorf("C_EncryptInit: %w", err)
	}
	ciphertext, err := s.Encrypt(s.Handle, kek)
	if err != nil {
		return fmt.Errorf("C_Encrypt: %w", err)
	}
	used := params.IV()
	if len(ciphertext) != len(kek)+gcmTag || !slices.ContainsFunc(used, func(b byte) bool { return b != 0 }) {
		return seal.Errorf(seal.CauseUnavailable, "turn off the token's own form of AES-GCM, or give the key CKA_WRAP and CKA_UNWRAP only",
			"token %v: its AES-GCM returned %d bytes with an IV of %d, which is not the form of the standard", s.Name(), len(ciphertext), len(used))
	}
	d.IV, d.Ciphertext = used, ciphertext
	return nil
}

func openGCM(s *session, k *key, m *mechanism, d *keyslot.Data) ([]byte, error) {
	params := pkcs11.NewGCMParams(d.IV, gcmContext, 8*gcmTag)
	defer params.Free()
	return s.decrypt(k, []*pkcs11.Mechanism{pkcs11.NewMechanism(m.ckm, params)}, d)
}

func (s *session) decrypt(k *key, m []*pkcs11.Mechanism, d *keyslot.Data) ([]byte, error) {
	if err := s.DecryptInit(s.Handle, m, k.handle); err != nil {
		return nil, fmt.Errorf("C_DecryptInit: %w", err)
	}
	b, err := s.Decrypt(s.Handle, d.Ciphertext)
	if err != nil {
		return nil, fmt.Errorf("C_Decrypt: %w", err)
	}
	return b, nil
}

func sealEncrypt(s *session, k *key, m *mechanism, kek []byte, d *keyslot.Data) error {
	if err := s.EncryptInit(s.Handle, m.parameter(), k.handle); err != nil {
		return fmt.Errorf("C_EncryptInit: %w", err)
	}
	ciphertext, err := s.Encrypt(s.Handle, kek)
	if err != nil {
		return fmt.Errorf("C_Encrypt: %w", err)
	}
	d.Ciphertext = ciphertext
	return nil
}

func openDecrypt(s *session, k *key, m *mechanism, d *keyslot.Data) ([]byte, error) {
	return s.decrypt(k, m.parameter(), d)
}

// carrier returns the attributes of an object that holds the KEK. It is an object of the
// session: it ends with the session, and no other session sees it.
func carrier(more ...*pkcs11.Attribute) []*pkcs11.Attribute {
	return append([]*pkcs11.Attribute{
		attribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY), attribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_GENERIC_SECRET), attribute(pkcs11.CKA_TOKEN, false),
		attribute(pkcs11.CKA_SENSITIVE, false), attribute(pkcs11.CKA_EXTRACTABLE, true),
	}, more...)
}

func sealWrapKey(s *session, k *key, m *mechanism, kek []byte, d *keyslot.Data) error {
	h, err := s.CreateObject(s.Handle, carrier(attribute(pkcs11.CKA_VALUE, kek)))
	if err != nil {
		return fmt.Errorf("C_CreateObject: %w", err)
	}
	defer func() { _ = s.DestroyObject(s.Handle, h) }() // the end of the session destroys it too
	ciphertext, err := s.WrapKey(s.Handle, m.parameter(), k.handle, h)
	if err != nil {
		return fmt.Errorf("C_WrapKey: %w", err)
	}
	d.Ciphertext = ciphertext
	return nil
}

func openUnwrapKey(s *session, k *key, m *mechanism, d *keyslot.Data) ([]byte, error) {
	h, err := s.UnwrapKey(s.Handle, m.parameter(), k.handle, d.Ciphertext, carrier())
	if err != nil {
		return nil, fmt.Errorf("C_UnwrapKey: %w", err)
	}
	defer func() { _ = s.DestroyObject(s.Handle, h) }()
	a, err := s.GetAttributeValue(s.Handle, h, []*pkcs11.Attribute{attribute(pkcs11.CKA_VALUE, nil)})
	if err != nil || len(a) != 1 {
		return nil, fmt.Errorf("C_GetAttributeValue: %w", err)
	}
	return a[0].Value, nil
}

// sealOAEP takes the public key only, and no session.
func sealOAEP(_ *session, k *key, _ *mechanism, kek []byte, d *keyslot.Data) (err error) {
	d.Ciphertext, err = rsa.EncryptOAEP(sha256.New(), rand.Reader, k.public, kek, nil)
	return err
}
