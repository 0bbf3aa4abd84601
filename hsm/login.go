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

// tried knows which PINs the tokens of a module did not take, so that none of them
// is given to its token again. It belongs to whoever has the turn.
type tried struct {
	key *seal.Secret // of the marks, and room for a PIN behind it; made with the first mark
	by  map[tokenName]map[pinMark]pkcs11.Error
	// right is the PIN with which a login went well last.
	right map[tokenName]pinMark
}

// pinMark stands for a PIN: the SHA-256 digest of a random key and the PIN. PINs are
// short: from a digest without a key they could be guessed. The key does not leave its
// locked memory, nor does what is hashed: crypto/hmac would leave a PIN on the heap
// until that is collected. That such a digest can be extended, as HMAC's can't, is no
// harm to one that nobody is shown.
type pinMark [sha256.Size]byte

// markKey is the size of the key in bytes: a block of the hash.
const markKey = sha256.BlockSize

func (t *tried) mark(mem seal.Memory, p *seal.Secret) (m pinMark, err error) {
	if t.key == nil {
		if t.key, err = mem.New(markKey + maxPIN); err != nil {
			return m, err
		}
		t.key.With(func(key []byte) { rand.Read(key[:markKey]) }) // never fails, see crypto/rand
	}
	t.key.With(func(key []byte) {
		p.With(func(b []byte) {
			room := key[markKey:]
			m = sha256.Sum256(key[:markKey+copy(room, b)])
			clear(room)
		})
	})
	return m, nil
}

// keep remembers what a token answered to a PIN.
func (t *tried) keep(name tokenName, m pinMark, answer pkcs11.Error) {
	if t.by[name] == nil {
		t.by[name] = map[pinMark]pkcs11.Error{}
	}
	t.by[name][m] = answer
	if slices.Contains(refusals, answer) {
		delete(t.right, name)
	}
}

// took forgets what the token did not take before: with a login its count begins anew.
func (t *tried) took(name tokenName, m pinMark) {
	delete(t.by, name)
	t.right[name] = m
}

// mayRepeat reports whether the PIN may be given once more: where it is known to be
// right, or where the device was in trouble, which PKCS#11 tells from a wrong PIN, and
// the token does not report that one was entered.
func (t *tried) mayRepeat(name tokenName, m pinMark, answer pkcs11.Error, flags uint) bool {
	const low = pkcs11.CKF_USER_PIN_COUNT_LOW | pkcs11.CKF_USER_PIN_FINAL_TRY | pkcs11.CKF_USER_PIN_LOCKED
	switch right, known := t.right[name]; {
	case slices.Contains(refusals, answer):
		return false
	case known && right == m:
		return true
	}
	return slices.Contains(trouble, answer) && flags&low == 0
}

var (
	// refusals are what a token says of a PIN that it does not take.
	refusals = []pkcs11.Error{pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_INVALID, pkcs11.CKR_PIN_LEN_RANGE, pkcs11.CKR_PIN_EXPIRED}
	// trouble is what it says where its device, or the way there, is not well.
	trouble = []pkcs11.Error{
		pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_DEVICE_MEMORY, pkcs11.CKR_HOST_MEMORY, pkcs11.CKR_FUNCTION_FAILED, pkcs11.CKR_FUNCTION_CANCELED, pkcs11.CKR_GENERAL_ERROR,
	}
	// gone is what it says of a session that ended, or of a token that was taken out,
	// before it looked at the PIN.
	gone = []pkcs11.Error{
		pkcs11.CKR_SESSION_HANDLE_INVALID, pkcs11.CKR_SESSION_CLOSED, pkcs11.CKR_DEVICE_REMOVED, pkcs11.CKR_TOKEN_NOT_PRESENT,
		pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED, pkcs11.CKR_SLOT_ID_INVALID,
	}
)

const (
	hintPIN = "put the right PIN into the file that pkcs11.pinFile names, or seal it for pkcs11.sealedPINFile with kleidi pkcs11-pin; " +
		"kleidi tries another PIN once, and this one again only after a restart"
	hintUnknown = "see whether the token is well, then restart kleidi, which gives the PIN once more; another PIN it gives without a restart"
	hintLocked  = "have the security officer unlock the user PIN (C_InitPIN); kleidi goes on by itself afterwards"
)

// login logs in where the token wants that, never again with a PIN that was refused, or
// for which mayRepeat doesn't speak. The function that it returns logs out.
func (s *session) login(t *tried, p *seal.Secret, mem seal.Memory) (logout func(), err error) {
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
	if answer, ok := t.by[name][mark]; ok && !t.mayRepeat(name, mark, answer, s.token.Flags) {
		return nil, s.notAgain(answer, s.token.Flags)
	}
	if s.token.Flags&pkcs11.CKF_USER_PIN_FINAL_TRY != 0 {
		return nil, s.refuse("log in by hand with the right PIN, which resets the count: pkcs11-tool --login --list-objects",
			"it reports that one more wrong PIN locks it, so that try is left to you")
	}
	err = lend(mem, p, func(b []byte) error { return s.Login(s.h, pkcs11.CKU_USER, unsafe.String(&b[0], len(b))) })
	answer, answered := errors.AsType[pkcs11.Error](err)
	switch {
	case err == nil:
		t.took(name, mark)
		return func() { _ = s.Logout(s.h) }, nil
	case answer == pkcs11.CKR_USER_ALREADY_LOGGED_IN: // by another user of the module, who logs out
		return func() {}, nil
	case answer == pkcs11.CKR_PIN_LOCKED:
		return nil, s.refuse(hintLocked, "C_Login: %w", err)
	case !answered || slices.Contains(gone, answer):
		return nil, fmt.Errorf("C_Login: %w", err)
	}
	t.keep(name, mark, answer)
	now, infoErr := s.GetTokenInfo(s.slot)
	switch {
	case slices.Contains(refusals, answer):
		return nil, s.refuse(hintPIN, "C_Login: %w%s", err, tries(now.Flags))
	case infoErr == nil && t.mayRepeat(name, mark, answer, now.Flags): // shown and not wrapped, see notAgain
		return nil, seal.Errorf(seal.CauseUnavailable, "see whether the token is well; kleidi tries again by itself", "token %v: it answered %v to C_Login", name, answer)
	}
	return nil, s.notAgain(answer, now.Flags)
}

// mayLogin says why no PIN can be given at all.
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
		return s.refuse("give another one", "the PIN has %d bytes, at most %d are used", size, maxPIN)
	case size == 0:
		return s.refuse("set pkcs11.pinFile or pkcs11.sealedPINFile", "it wants a PIN and none is configured")
	}
	return nil
}

func (s *session) refuse(hint, format string, args ...any) error {
	return seal.Errorf(seal.CauseCredentials, hint, "token %v: %w", nameOf(s.token), fmt.Errorf(format, args...))
}

// notAgain says why a PIN is not given to the token once more. An answer that is no
// refusal may have counted as one all the same, and it may come each time: it is
// shown and not wrapped, so that nothing takes it for a lost session.
func (s *session) notAgain(answer pkcs11.Error, flags uint) error {
	if slices.Contains(refusals, answer) {
		return s.refuse(hintPIN, "it refused this PIN before, so it is not asked again%s", tries(flags))
	}
	return seal.Errorf(seal.CauseUnavailable, hintUnknown, "token %v: it answered %v to C_Login, which may have counted as a wrong PIN, so this PIN is not given again%s",
		nameOf(s.token), answer, tries(flags))
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
