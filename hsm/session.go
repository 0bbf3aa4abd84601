//go:build cgo

package hsm

import (
	"context"
	"fmt"

	"github.com/miekg/pkcs11"

	"github.com/beezy-dev/kleidi/hsm/internal/cryptoki"
)

// session is an open session with the configured token.
type session struct {
	*cryptoki.Session
}

// Settle waits until no call into a PKCS#11 module runs in this process, or until ctx ends. A
// process calls it before it ends: SoftHSM, for example, loses a token whose files it was
// writing at that moment.
func Settle(ctx context.Context) { cryptoki.Settle(ctx) }

func attribute(typ uint, value any) *pkcs11.Attribute { return pkcs11.NewAttribute(typ, value) }

// mostObjects bounds how many objects findObjects returns: enough to find out that
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
	if err := s.FindObjectsInit(s.Handle, template); err != nil {
		return nil, fmt.Errorf("C_FindObjectsInit: %w", err)
	}
	handles, _, err := s.FindObjects(s.Handle, mostObjects)
	if err != nil {
		err = fmt.Errorf("C_FindObjects: %w", err)
	}
	if final := s.FindObjectsFinal(s.Handle); final != nil && err == nil {
		err = fmt.Errorf("C_FindObjectsFinal: %w", final)
	}
	return handles, err
}

// read returns an attribute of an object, or nil if the token doesn't have it or
// doesn't show it.
func (s *session) read(o pkcs11.ObjectHandle, typ uint) []byte {
	a, err := s.GetAttributeValue(s.Handle, o, []*pkcs11.Attribute{attribute(typ, nil)})
	if err != nil || len(a) != 1 {
		return nil
	}
	return a[0].Value
}

// offers reports whether the token offers the mechanism.
func (s *session) offers(m *mechanism) bool {
	info, err := s.GetMechanismInfo(s.Slot, []*pkcs11.Mechanism{pkcs11.NewMechanism(m.ckm, nil)})
	return err == nil && info.Flags&m.offer == m.offer
}
