//go:build cgo

package cryptoki

import (
	"crypto/rand"
	"crypto/sha256"
	"slices"

	"github.com/miekg/pkcs11"

	"github.com/beezy-dev/kleidi/hsm/internal/keyslot"
	"github.com/beezy-dev/kleidi/hsm/internal/pinfile"
	"github.com/beezy-dev/kleidi/seal"
)

// pinRecord records how a module's tokens answered PINs, so that kleidi never repeats a
// PIN that a token has refused. Only the holder of the module's lock may use it.
type pinRecord struct {
	// key is the key of the marks, followed by room for a PIN. It is made with the
	// first mark.
	key *seal.Secret
	// answers holds the failed logins since the last successful one.
	answers map[keyslot.TokenName]map[pinMark]pkcs11.Error
	// accepted is the PIN of the last successful login.
	accepted map[keyslot.TokenName]pinMark
}

func newPINRecord() pinRecord {
	return pinRecord{answers: map[keyslot.TokenName]map[pinMark]pkcs11.Error{}, accepted: map[keyslot.TokenName]pinMark{}}
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
		if t.key, err = mem.New(markKeySize + pinfile.MaxPIN); err != nil {
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
func (t *pinRecord) failed(name keyslot.TokenName, m pinMark, answer pkcs11.Error) {
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
func (t *pinRecord) succeeded(name keyslot.TokenName, m pinMark) {
	delete(t.answers, name)
	t.accepted[name] = m
}

// mayRepeat reports whether a PIN may be given to the token again after this answer. It
// may if the PIN is known to be right, or if the device was in trouble and the token
// does not report a wrong PIN: PKCS#11 has other answers for a wrong PIN.
func (t *pinRecord) mayRepeat(name keyslot.TokenName, m pinMark, answer pkcs11.Error, flags uint) bool {
	const low = pkcs11.CKF_USER_PIN_COUNT_LOW | pkcs11.CKF_USER_PIN_FINAL_TRY | pkcs11.CKF_USER_PIN_LOCKED
	switch accepted, known := t.accepted[name]; {
	case slices.Contains(refusals, answer):
		return false
	case known && accepted == m:
		return true
	}
	return slices.Contains(DeviceTrouble, answer) && flags&low == 0
}

var (
	// refusals are the answers to a wrong or unusable PIN.
	refusals = []pkcs11.Error{pkcs11.CKR_PIN_INCORRECT, pkcs11.CKR_PIN_INVALID, pkcs11.CKR_PIN_LEN_RANGE, pkcs11.CKR_PIN_EXPIRED}
	// DeviceTrouble are the answers of a token whose device, or the way to it, fails.
	DeviceTrouble = []pkcs11.Error{
		pkcs11.CKR_DEVICE_ERROR, pkcs11.CKR_DEVICE_MEMORY, pkcs11.CKR_HOST_MEMORY, pkcs11.CKR_FUNCTION_FAILED, pkcs11.CKR_FUNCTION_CANCELED, pkcs11.CKR_GENERAL_ERROR,
	}
)
