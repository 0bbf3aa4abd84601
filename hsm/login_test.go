//go:build cgo

package hsm

import (
	"context"
	"os"
	"testing"

	"github.com/miekg/pkcs11"

	"github.com/beezy-dev/kleidi/hsm/internal/cryptoki"
	"github.com/beezy-dev/kleidi/seal"
)

// TestSameWrongPINAgain: a wrong PIN costs one try, however often its file is written, and
// whether it comes from the file or from the program. Another wrong PIN costs another try.
// The right PIN logs in.
func TestSameWrongPINAgain(t *testing.T) {
	b, triesFile := habits(t)
	w := b.generated(t, 0, "kek")
	kek := newKEK(t)
	slot := must[seal.Slot](t)(w.Wrap(t.Context(), kek))
	counted := wrongPINs(t, triesFile)
	setPIN(t, w, wrongPIN)
	refuses(t, w, slot, seal.CauseCredentials, "PIN")
	for _, same := range []string{wrongPIN, wrongPIN + "\nbut a comment", wrongPIN} {
		ok(t, os.Remove(w.config.PINFile))
		setPIN(t, w, same)
		refuses(t, w, slot, seal.CauseCredentials, "refused this PIN before")
	}
	c := w.config
	c.PINFile, c.PIN = "", func(context.Context) (*seal.Secret, error) { return seal.Memory{}.Take([]byte(wrongPIN)) }
	refuses(t, newWrapper(t, c), slot, seal.CauseCredentials, "refused this PIN before")
	counted("1")
	setPIN(t, w, testPIN)
	opens(t, w, slot, kek)
	counted("0")
	setPIN(t, w, wrongPIN) // the token's PIN may have been set to it since
	refuses(t, w, slot, seal.CauseCredentials, "PIN")
	setPIN(t, w, wrongPIN+"0")
	refuses(t, w, slot, seal.CauseCredentials, "PIN")
	counted("2")
}

// Login calls f.login, if it is set.
func (f *faulty) Login(h pkcs11.SessionHandle, user uint, pin string) error {
	if f.login != nil {
		if err := f.login(); err != nil {
			return err
		}
	}
	return f.Functions.Login(h, user, pin)
}

// TestUnknownAnswerToLogin: the token may have counted an ambiguous answer to C_Login as a
// wrong PIN. So a PIN that has never logged in is given only once, until another PIN is
// configured or the process starts again.
func TestUnknownAnswerToLogin(t *testing.T) {
	b := softHSM(t)
	w := b.generated(t, 0, "kek")
	kek := newKEK(t)
	slot := must[seal.Slot](t)(w.Wrap(t.Context(), kek))
	for answer, shown := range map[pkcs11.Error]string{
		pkcs11.CKR_USER_NOT_LOGGED_IN: "CKR_USER_NOT_LOGGED_IN", pkcs11.CKR_OPERATION_ACTIVE: "CKR_OPERATION_ACTIVE", 0x80000105: "0x80000105",
	} {
		given := 0
		f := fault(w)
		f.login = func() error { given++; return answer }
		for range 5 {
			refuses(t, w, slot, seal.CauseUnavailable, shown)
			refuses(t, w, slot, seal.CauseUnavailable, "may have counted that as a wrong PIN, so kleidi does not give this PIN again")
		}
		if given != 1 {
			t.Errorf("%v: the PIN was given %d times", answer, given)
		}
		f.login = func() error { given++; return nil } // the token works again, but nobody knows that
		setPIN(t, w, testPIN)
		refuses(t, w, slot, seal.CauseUnavailable, "restart kleidi, which gives the PIN once more")
		setPIN(t, w, wrongPIN)
		refuses(t, w, slot, seal.CauseCredentials, "PIN")
		if given != 2 {
			t.Errorf("%v: PINs were given %d times, and the second one is new", answer, given)
		}
		setPIN(t, w, testPIN)
		refuses(t, w, slot, seal.CauseUnavailable, shown)
		fault(w) // as a process that starts again
		opens(t, w, slot, kek)
	}
}

// TestTroubleAtLogin: kleidi tries a PIN again if the device was in trouble, unless the
// token reports a wrong PIN. It tries a PIN that has logged in before again after every
// ambiguous answer.
func TestTroubleAtLogin(t *testing.T) {
	b := softHSM(t)
	w := b.generated(t, 0, "kek")
	kek := newKEK(t)
	slot := must[seal.Slot](t)(w.Wrap(t.Context(), kek))
	f := fault(w)
	for _, answer := range append(cryptoki.DeviceTrouble, 0x80000105) {
		f.login = func() error { return answer }
		for range 3 {
			refuses(t, w, slot, seal.CauseUnavailable, "kleidi tries again by itself")
		}
		f.login = nil
		opens(t, w, slot, kek) // so the PIN is known to be right before the vendor's code comes
	}
	f.login = func() error { return pkcs11.Error(pkcs11.CKR_PIN_INCORRECT) } // set again on the token
	refuses(t, w, slot, seal.CauseCredentials, "PIN")
	f.login = func() error { return pkcs11.Error(pkcs11.CKR_DEVICE_ERROR) }
	refuses(t, w, slot, seal.CauseCredentials, "refused this PIN before")

	f = fault(w)
	given := 0
	f.login = func() error { given++; return pkcs11.Error(pkcs11.CKR_DEVICE_ERROR) }
	f.flags = pkcs11.CKF_USER_PIN_COUNT_LOW
	refuses(t, w, slot, seal.CauseUnavailable, "so kleidi does not give this PIN again")
	refuses(t, w, slot, seal.CauseUnavailable, "so kleidi does not give this PIN again")
	if given != 1 {
		t.Errorf("the PIN was given %d times to a token that counts a wrong one", given)
	}
}

// TestTokenGoneAtLogin: a token that was taken out during C_Login has not seen the PIN. So
// kleidi gives it the PIN again, once for each operation.
func TestTokenGoneAtLogin(t *testing.T) {
	b := softHSM(t)
	w := b.generated(t, 0, "kek")
	kek := newKEK(t)
	slot := must[seal.Slot](t)(w.Wrap(t.Context(), kek))
	for _, answer := range cryptoki.PINUnseen {
		given := 0
		f := fault(w)
		f.login = func() error { given++; return answer }
		_, err := w.Unwrap(t.Context(), slot)
		checkFault(t, err, seal.CauseUnavailable, "C_Login: ")
		if given != 2 {
			t.Errorf("%v: the PIN was given %d times, want once and once more", answer, given)
		}
		f.login = nil
		opens(t, w, slot, kek)
	}
}
