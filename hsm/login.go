//go:build cgo

package hsm

import (
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"unsafe"

	"github.com/miekg/pkcs11"

	"github.com/beezy-dev/kleidi/seal"
)

// pinRecord records the answers of a module's tokens to PINs, so that kleidi does not
// give a token a PIN again that it has refused. Whoever holds the lock of the module
// may use it.
type pinRecord struct {
	// key is the key of the marks, followed by room for a PIN. It is made with the
	// first mark.
	key *seal.Secret
	// answers holds the failed logins since the last successful one.
	answers map[tokenName]map[pinMark]pkcs11.Error
	// accepted is the PIN of the last successful login.
	accepted map[tokenName]pinMark
}

func newPINRecord() pinRecord {
	return pinRecord{answers: map[tokenName]map[pinMark]pkcs11.Error{}, accepted: map[tokenName]pinMark{}}
}

// pinMark represents a PIN: the SHA-256 digest of a random key and the PIN. Without the
// key, a short PIN could be guessed from its digest. The key and the PIN are hashed in
// locked memory; crypto/hmac would leave the PIN on the heap until that is collected.
// Unlike an HMAC, such a digest can be extended, which does not matter because nobody
// is shown it.
type pinMark [sha256.Size]byte

// markKeySize is the size of the key in bytes: a block of the hash.
const markKeySize = sha256.BlockSize

// mark returns the mark of a PIN.
func (t *pinRecord) mark(mem seal.Memory, p *seal.Secret) (m pinMark, err error) {
	if t.key == nil {
		if t.key, err = mem.New(markKeySize + maxPIN); err != nil {
			return m, err
		}
		t.key.With(func(key []byte) { rand.Read(key[:markKeySize]) }) // crypto/rand.Read never fails
	}
	t.key.With(func(key []byte) {
		p.With(func(b []byte) {
			room := key[markKeySize:]
			m = sha256.Sum256(key[:markKeySize+copy(room, b)])
			clear(room)
		})
	})
	return m, nil
}

// failed records the answer of a token to a PIN that did not log in.
func (t *pinRecord) failed(name tokenName, m pinMark, answer pkcs11.Error) {
	if t.answers[name] == nil {
		t.answers[name] = map[pinMark]pkcs11.Error{}
	}
	t.answers[name][m] = answer
	if slices.Contains(refusals, answer) {
		delete(t.accepted, name)
	}
}

// succeeded records the PIN of a successful login, and forgets the failed ones before:
// the token counts wrong PINs from zero again.
func (t *pinRecord) succeeded(name tokenName, m pinMark) {
	delete(t.answers, name)
	t.accepted[name] = m
}

// mayRepeat reports whether a PIN may be given to the token again after this answer. It
// may if the PIN is known to be right, or if the device was in trouble and the token
// does not report a wrong PIN: PKCS#11 has other answers for a wrong PIN.
func (t *pinRecord) mayRepeat(name tokenName, m pinMark, answer pkcs11.Error, flags uint) bool {
	const low = pkcs11.CKF_USER_PIN_COUNT_LOW | pkcs11.CKF_USER_PIN_FINAL_TRY | pkcs11.CKF_USER_PIN_LOCKED
	switch accepted, known := t.accepted[name]; {
	case slices.Contains(refusals, answer):
		return false
	case known && accepted == m:
		return true
	}
	return slices.Contains(deviceTrouble, answer) && flags&low == 0
}

var (
	// refusals are the answers to a wrong or unusable PIN.
	refusals = []pkcs11.Error{pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_INVALID, pkcs11.CKR_PIN_LEN_RANGE, pkcs11.CKR_PIN_EXPIRED}
	// deviceTrouble are the answers of a token whose device, or the way to it, fails.
	deviceTrouble = []pkcs11.Error{
		pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_DEVICE_MEMORY, pkcs11.CKR_HOST_MEMORY, pkcs11.CKR_FUNCTION_FAILED, pkcs11.CKR_FUNCTION_CANCELED, pkcs11.CKR_GENERAL_ERROR,
	}
	// pinUnseen are the answers if the session ended, or the token was taken out, before
	// the token saw the PIN.
	pinUnseen = []pkcs11.Error{
		pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_SESSION_CLOSED, pkcs11.CKR_DEVICE_REMOVED, pkcs11.CKR_TOKEN_NOT_PRESENT,
		pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED, pkcs11.CKR_SLOT_ID_INVALID,
	}
)

const (
	hintPIN = "put the right PIN into the file that pkcs11.pinFile names, or seal it for pkcs11.sealedPINFile with kleidi pkcs11-pin --pin-file FILE --out FILE; " +
		"kleidi tries another PIN once, and this one again only after a restart"
	hintUnknown = "see whether the token is well, then restart kleidi, which gives the PIN once more; kleidi gives another PIN without a restart"
	hintLocked  = "have the security officer unlock the user PIN (C_InitPIN); afterwards kleidi goes on by itself"
)

// login logs in if the token demands it, and returns a function that logs out. It does
// not use a PIN again that the token refused, or that pinRecord.mayRepeat excludes.
func (s *session) login(t *pinRecord, p *seal.Secret, mem seal.Memory) (logout func(), err error) {
	if s.token.Flags&pkcs11.CKF_LOGIN_REQUIRED == 0 {
		return func() {}, nil
	}
	if err := s.mayLogin(p); err != nil {
		return nil, err
	}
	mark, err := t.mark(mem, p)
	if err != nil {
		return nil, err
	}
	name := nameOf(s.token)
	if answer, ok := t.answers[name][mark]; ok && !t.mayRepeat(name, mark, answer, s.token.Flags) {
		return nil, s.refuseAgain(answer, s.token.Flags)
	}
	if s.token.Flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0 {
		return nil, s.refuse("log in by hand with the right PIN, which resets the count: pkcs11-tool --login --list-objects",
			"it reports that one more wrong PIN locks it, so kleidi leaves that try to you")
	}
	err = withCopy(mem, p, func(b []byte) error { return s.Login(s.h, pkcs11.CKU_USER, unsafe.String(&b[0], len(b))) })
	answer, answered := errors.AsType[pkcs11.Error](err)
	switch {
	case err == nil:
		t.succeeded(name, mark)
		return func() { _ = s.Logout(s.h) }, nil
	case answer == pkcs11.CKR_USER_ALREADY_LOGGED_IN: // another user of the module has logged in, and logs out
		return func() {}, nil
	case answer == pkcs11.CKR_PIN_LOCKED:
		return nil, s.refuse(hintLocked, "C_Login: %w", err)
	case !answered || slices.Contains(pinUnseen, answer):
		return nil, fmt.Errorf("C_Login: %w", err)
	}
	t.failed(name, mark, answer)
	now, infoErr := s.GetTokenInfo(s.slot)
	switch {
	case slices.Contains(refusals, answer):
		return nil, s.refuse(hintPIN, "C_Login: %w%s", err, tries(now.Flags))
	case infoErr == nil && t.mayRepeat(name, mark, answer, now.Flags): // %v, not %w: see refuseAgain
		return nil, seal.Errorf(seal.CauseUnavailable, "see whether the token is well; kleidi tries again by itself", "token %v: it answered %v to C_Login", name, answer)
	}
	return nil, s.refuseAgain(answer, now.Flags)
}

// mayLogin checks that a login is possible at all.
func (s *session) mayLogin(p *seal.Secret) error {
	var size int
	if p != nil {
		p.With(func(b []byte) { size = len(b) })
	}
	switch {
	case s.token.Flags&pkcs11.CKF_USER_PIN_INITIALIZED == 0:
		return s.refuse("set one, for instance with pkcs11-tool --init-pin", "it has no user PIN yet")
	case s.token.Flags&pkcs11.CKF_USER_PIN_LOCKED != 0:
		return s.refuse(hintLocked, "it reports that its user PIN is locked")
	case size > maxPIN:
		return s.refuse("set a shorter one", "the PIN has %d bytes, at most %d are allowed", size, maxPIN)
	case size == 0:
		return s.refuse("set pkcs11.pinFile or pkcs11.sealedPINFile", "it demands a PIN, and none is configured")
	}
	return nil
}

func (s *session) refuse(hint, format string, args ...any) error {
	return seal.Errorf(seal.CauseCredentials, hint, "token %v: %w", nameOf(s.token), fmt.Errorf(format, args...))
}

// refuseAgain is the error for a PIN that is not given to the token again. The token may
// have counted an answer as a wrong PIN even if that answer is no refusal. Such an
// answer is formatted with %v, not %w, so that isLost does not take it for a lost
// session and repeat the login.
func (s *session) refuseAgain(answer pkcs11.Error, flags uint) error {
	if slices.Contains(refusals, answer) {
		return s.refuse(hintPIN, "it refused this PIN before, so kleidi does not give it again%s", tries(flags))
	}
	return seal.Errorf(seal.CauseUnavailable, hintUnknown, "token %v: it answered %v to C_Login and may have counted that as a wrong PIN, so kleidi does not give this PIN again%s",
		nameOf(s.token), answer, tries(flags))
}

// tries describes what the token's flags say about the remaining tries.
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
