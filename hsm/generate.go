//go:build cgo

package hsm

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"

	"github.com/miekg/pkcs11"

	"github.com/beezy-dev/kleidi/hsm/internal/keyslot"
	"github.com/beezy-dev/kleidi/seal"
)

const keySize = 32 // bytes, for AES-256

// generateKey makes a key that never leaves the token. It fails if a key that matches
// exists already.
func (s *session) generateKey(want *keyMatch) (*key, error) {
	if want.class == keyslot.ClassPrivate {
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
			"token %v already has a key with %v, and kleidi overwrites no key", s.Name(), want)
	}
	id := want.id
	if len(id) == 0 {
		id = make([]byte, 16)
		rand.Read(id)
	}
	h, err := s.GenerateKey(s.Handle, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_KEY_GEN, nil)}, s.template(want.label, id))
	if err != nil {
		return nil, fmt.Errorf("C_GenerateKey: %w", err)
	}
	k, err := s.checkGenerated(h, want)
	if err != nil {
		_ = s.DestroyObject(s.Handle, h) // it has wrapped nothing yet
		return nil, err
	}
	return k, nil
}

// template returns the attributes of a generated key. The key may encrypt and decrypt,
// if the token offers a mechanism for that. If not, it may wrap and unwrap.
func (s *session) template(label string, id []byte) []*pkcs11.Attribute {
	wraps := true
	for i := range mechanisms {
		if m := &mechanisms[i]; m.class == keyslot.ClassSecret && slices.Contains(m.needs, pkcs11.CKA_ENCRYPT) && s.offers(m) {
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

// checkGenerated checks that the generated key has the attributes of the template, and
// that nobody else has made a key of the same name in the meantime.
func (s *session) checkGenerated(h pkcs11.ObjectHandle, want *keyMatch) (*key, error) {
	if !bytes.Equal(s.read(h, pkcs11.CKA_SENSITIVE), []byte{1}) || !bytes.Equal(s.read(h, pkcs11.CKA_EXTRACTABLE), []byte{0}) {
		return nil, seal.Errorf(seal.CauseUnavailable, "have the token's administrator allow sensitive keys that can't be extracted", "token %v made a key that could leave it", s.Name())
	}
	same, err := s.findObjects(want, attribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY))
	if err != nil {
		return nil, err
	}
	if len(same) != 1 {
		return nil, seal.Errorf(seal.CauseUnavailable, "see what made it; then leave --generate-key out to use that key", "token %v got another key with %v at the same time", s.Name(), want)
	}
	return s.readKey(h, keyslot.ClassSecret)
}
