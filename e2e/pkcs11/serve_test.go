package pkcs11

import (
	"bytes"
	"net/http"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
)

// TestSessionKilledOnce: if a token ends a session, kleidi asks it again, in every
// operation, and nobody notices.
func TestSessionKilledOnce(t *testing.T) {
	k := newSoftHSM(t)
	s := newSite(t, k, "[pkcs11]")
	killed := func() {
		t.Helper()
		if got := k.read("fault"); got != "" {
			t.Errorf("no session was killed: %q", got)
		}
	}
	for _, command := range []string{"slot test", "rotate", "slot rewrap pkcs11"} {
		k.fault("killed-once")
		s.Do(command)
		killed()
	}
	k.fault("killed-once")
	s.Restart()
	s.WaitOpen()
	killed()
	s.Decrypts()
}

// TestSkipsSlot: if a token disappears during a rotation, the rotation ends and changes
// nothing. With --skip-slot the rotation goes on without the token, and kleidi reports
// the missing slot until it is repaired.
func TestSkipsSlot(t *testing.T) {
	k := newSoftHSM(t)
	s := newSite(t, k, "[tpm, pkcs11]")
	before := s.Stored()
	k.fault("removed")
	s.Refuse("rotate", "wrap the new KEK for the pkcs11 slot", "the token is not there")
	s.Refuse("rotate --skip-slot tpm", "the token is not there")
	s.Refuse("rotate --skip-slot tpm --skip-slot pkcs11", "no slot would be left")
	if !bytes.Equal(before, s.Stored()) {
		t.Error("a refused rotation changed the keyring")
	}
	s.Do("rotate --skip-slot pkcs11")
	s.Do("status", "left out by the rotation")
	s.Do("slot list", "left out by the rotation")
	s.Refuse("slot test", "DOES NOT OPEN", "run kleidi slot add pkcs11 once its backend answers")
	s.Restart()
	s.WaitOpen()
	s.WaitSays(http.StatusOK, "self-test: slot pkcs11 does not open", "run kleidi slot add pkcs11")
	s.Metric("kleidi_self_test_failed_slots 1")
	k.fault("")
	s.Do("slot add pkcs11", "the KEK is wrapped by pkcs11 as well")
	s.Do("slot test", "pkcs11")
	s.Do("rotate")
	s.Decrypts()
	secrets := k.secrets()
	secrets["KEK"] = k.kek(s.SlotOf(seal.TypePKCS11))
	s.SaidNone(secrets)
}
