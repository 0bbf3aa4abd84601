//go:build cgo

package hsm

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"unsafe"

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
func withSession[T any](m *module, w *Wrapper, p *pin, flags uint, f func(*session) (T, error)) (result T, err error) {
	s := &session{cryptoki: m.p}
	if err := s.find(&w.target.token); err != nil {
		return result, err
	}
	if s.h, err = s.OpenSession(s.slot, pkcs11.CKF_SERIAL_SESSION|flags); err != nil {
		return result, fmt.Errorf("C_OpenSession: %w", err)
	}
	defer func() { _ = s.CloseSession(s.h) }() // a session that is gone is closed
	logout, err := s.login(m, p, w.config.Memory)
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

// refusals are what a token says of a PIN that it does not take.
var refusals = []pkcs11.Error{pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_INVALID, pkcs11.CKR_PIN_LEN_RANGE, pkcs11.CKR_PIN_EXPIRED}

const (
	hintPIN    = "put the right PIN into the file that pkcs11.pinFile names; kleidi tries it once as soon as the file changes"
	hintLocked = "have the security officer unlock the user PIN (C_InitPIN); kleidi goes on by itself afterwards"
)

// login logs in where the token wants that, at most once with each PIN. The
// function that it returns logs out.
func (s *session) login(m *module, p *pin, mem seal.Memory) (logout func(), err error) {
	flags, name := s.token.Flags, nameOf(s.token)
	if flags&pkcs11.CKF_LOGIN_REQUIRED == 0 {
		return func() {}, nil
	}
	refuse := func(hint, format string, args ...any) error {
		return seal.Errorf(seal.CauseCredentials, hint, "token %v: %w", name, fmt.Errorf(format, args...))
	}
	switch {
	case flags&pkcs11.CKF_USER_PIN_INITIALIZED == 0:
		return nil, refuse("set one, for instance with pkcs11-tool --init-pin", "it has no user PIN yet")
	case flags&pkcs11.CKF_USER_PIN_LOCKED != 0:
		return nil, refuse(hintLocked, "it reports that its user PIN is locked")
	case p.size() == 0:
		return nil, refuse("set pkcs11.pinFile", "it wants a PIN and none is configured")
	case p.same(m.refused[name.String()]):
		return nil, refuse(hintPIN, "it refused this PIN before, so it is not asked again%s", tries(flags))
	case flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0:
		return nil, refuse("log in by hand with the right PIN, which resets the count: pkcs11-tool --login --list-objects",
			"it reports that one more wrong PIN locks it, so that try is left to you")
	}
	err = lend(mem, p.Secret, func(b []byte) error { return s.Login(s.h, pkcs11.CKU_USER, unsafe.String(&b[0], len(b))) })
	code, _ := errors.AsType[pkcs11.Error](err)
	switch {
	case err == nil:
		m.forget(name)
		return func() { _ = s.Logout(s.h) }, nil
	case code == pkcs11.CKR_USER_ALREADY_LOGGED_IN: // by another user of the module, who logs out
		return func() {}, nil
	case code == pkcs11.CKR_PIN_LOCKED:
		return nil, refuse(hintLocked, "C_Login: %w", err)
	case slices.Contains(refusals, code):
		m.remember(name, p)
		now, _ := s.GetTokenInfo(s.slot)
		return nil, refuse(hintPIN, "C_Login: %w%s", err, tries(now.Flags))
	}
	return nil, fmt.Errorf("C_Login: %w", err)
}

// tries says what a token reports of the tries that are left.
func tries(flags uint) string {
	switch {
	case flags&pkcs11.CKF_USER_PIN_LOCKED != 0:
		return "; the token reports that the PIN is now locked"
	case flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0:
		return "; the token reports that one try is left"
	case flags&pkcs11.CKF_USER_PIN_COUNT_LOW != 0:
		return "; the token reports that a wrong PIN was entered since the last right one"
	}
	return ""
}

// remember keeps a PIN that was refused, in its locked memory, to know it again.
func (m *module) remember(name tokenName, p *pin) {
	m.forget(name)
	m.refused[name.String()] = p.keep()
}

func (m *module) forget(name tokenName) {
	m.refused[name.String()].close()
	delete(m.refused, name.String())
}

// same reports whether the token would be asked the same question again.
func (p *pin) same(o *pin) bool {
	return p.size() > 0 && o.size() > 0 && p.stamp == o.stamp && p.Equal(o.Secret)
}

// keep takes the PIN out of p, which then closes nothing.
func (p *pin) keep() *pin {
	kept := *p
	p.Secret = nil
	return &kept
}
