//go:build cgo

package hsm

import (
	"fmt"

	"github.com/miekg/pkcs11"
)

// session is an open session with the configured token.
type session struct {
	cryptoki
	h     pkcs11.SessionHandle
	slot  uint // PKCS#11's slot, in which the token is
	token pkcs11.TokenInfo
}

func attribute(typ uint, value any) *pkcs11.Attribute { return pkcs11.NewAttribute(typ, value) }

// mostObjects is how many objects findObjects returns: enough to find out that
// several match.
const mostObjects = 4

// findObjects returns the objects on the token that match, but not more than
// mostObjects.
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
	handles, _, err := s.FindObjects(s.h, mostObjects)
	if err != nil {
		err = fmt.Errorf("C_FindObjects: %w", err)
	}
	if final := s.FindObjectsFinal(s.h); final != nil && err == nil {
		err = fmt.Errorf("C_FindObjectsFinal: %w", final)
	}
	return handles, err
}

// read returns an attribute of an object, or nil if the token doesn't have it or
// doesn't show it.
func (s *session) read(o pkcs11.ObjectHandle, typ uint) []byte {
	a, err := s.GetAttributeValue(s.h, o, []*pkcs11.Attribute{attribute(typ, nil)})
	if err != nil || len(a) != 1 {
		return nil
	}
	return a[0].Value
}

// offers reports whether the token offers the mechanism.
func (s *session) offers(m *mechanism) bool {
	info, err := s.GetMechanismInfo(s.slot, []*pkcs11.Mechanism{pkcs11.NewMechanism(m.ckm, nil)})
	return err == nil && info.Flags&m.offer == m.offer
}
