package keys

import (
	"bytes"
	"errors"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// TestOwnerValueIsCleared: the session of a command does not keep the value, whether the
// command succeeds or fails.
func TestOwnerValueIsCleared(t *testing.T) {
	for name, end := range map[string]func(*ownerSession) error{
		"success": func(s *ownerSession) error { return s.Validate(0, 0, nil, nil, 0, nil) },
		"failure": func(s *ownerSession) error { return s.CleanupFailure(nil) },
	} {
		s := &ownerSession{ended{}, []byte("secret")}
		if err := end(s); !errors.Is(err, errEnded) {
			t.Errorf("%s: %v", name, err)
		}
		if !bytes.Equal(s.value, make([]byte, 6)) {
			t.Errorf("%s: %q is left", name, s.value)
		}
	}
}

var errEnded = errors.New("ended")

// ended is a session whose command ends.
type ended struct{ tpm2.Session }

func (ended) CleanupFailure(transport.TPM) error { return errEnded }

func (ended) Validate(tpm2.TPMRC, tpm2.TPMCC, []byte, []tpm2.TPM2BName, int, *tpm2.TPMSAuthResponse) error {
	return errEnded
}
