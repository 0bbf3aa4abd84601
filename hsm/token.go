//go:build cgo

package hsm

import (
	"fmt"
	"strings"

	"github.com/miekg/pkcs11"

	"github.com/beezy-dev/kleidi/seal"
)

// session is an open session with the token that is meant.
type session struct {
	cryptoki
	h     pkcs11.SessionHandle
	slot  uint
	token pkcs11.TokenInfo
}

// withSession finds the token, opens a session, logs in, calls f, and undoes all that.
func withSession[T any](m *module, w *Wrapper, p *seal.Secret, flags uint, f func(*session) (T, error)) (result T, err error) {
	s := &session{cryptoki: m.p}
	if err := s.find(&w.target.token); err != nil {
		return result, err
	}
	if s.h, err = s.OpenSession(s.slot, pkcs11.CKF_SERIAL_SESSION|flags); err != nil {
		return result, fmt.Errorf("C_OpenSession: %w", err)
	}
	defer func() { _ = s.CloseSession(s.h) }() // a session that is gone is closed
	logout, err := s.login(&m.tried, p, w.config.Memory)
	if err != nil {
		return result, err
	}
	defer logout()
	return f(s)
}

// trim removes the padding of PKCS#11's fixed fields, and what is no text.
func trim(s string) string { return strings.ToValidUTF8(strings.TrimRight(s, " \x00"), "?") }

func nameOf(t pkcs11.TokenInfo) tokenName { return tokenName{trim(t.Label), trim(t.SerialNumber)} }

func (n tokenName) String() string { return fmt.Sprintf("%q (serial %q)", n.Label, n.Serial) }

// matches reports whether the token in a slot is meant.
func (t *tokenMatch) matches(slot uint, info pkcs11.TokenInfo) bool {
	is := func(want, have string) bool { return want == "" || trim(want) == trim(have) }
	return is(t.label, info.Label) && is(t.serial, info.SerialNumber) && is(t.manufacturer, info.ManufacturerID) && is(t.model, info.Model) &&
		(t.slotID == nil || *t.slotID == slot)
}

// shownTokens bounds how many tokens an error lists.
const shownTokens = 6

// find finds the one token that is meant.
func (s *session) find(want *tokenMatch) error {
	slots, err := s.GetSlotList(true)
	if err != nil {
		return fmt.Errorf("C_GetSlotList: %w", err)
	}
	var there []string
	found := 0
	for _, slot := range slots {
		info, err := s.GetTokenInfo(slot)
		if err != nil {
			continue // it was taken out, or is not one
		}
		if there = append(there, nameOf(info).String()); len(there) > shownTokens {
			there = append(there[:shownTokens], "…")
		}
		if want.matches(slot, info) {
			s.slot, s.token = slot, info
			found++
		}
	}
	if found == 1 {
		return nil
	}
	list := strings.Join(there, ", ")
	if list == "" {
		list = "none"
	}
	if found > 1 {
		return seal.Errorf(seal.CauseUnavailable, "add serial=… to pkcs11.uri", "%d tokens match the configuration; the module shows: %s", found, list)
	}
	return seal.Errorf(seal.CauseUnavailable, "connect the token, or name one of those with token=… in pkcs11.uri; kleidi tries again by itself",
		"the token is not there; the module shows: %s", list)
}
