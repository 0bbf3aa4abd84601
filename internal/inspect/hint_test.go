package inspect

import (
	"crypto"
	"errors"
	"fmt"
	"testing"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// TestHintOf: the hint to save evidence again appears only if a new file may have
// another result.
func TestHintOf(t *testing.T) {
	const again = "save it again"
	for _, c := range []struct {
		err  error
		want string
	}{
		{fmt.Errorf("firmware event log: %w", eventlog.ErrSHA1Log), "set the firmware's TPM to 2.0 with a SHA-256 bank"},
		{&eventlog.BankError{Bank: crypto.SHA256, Has: []crypto.Hash{crypto.SHA1}}, "switch on SHA-256 in the firmware's settings of the TPM"},
		{&eventlog.MismatchError{Bank: crypto.SHA256, PCRs: []int{4}}, again},
		{errors.New("quote: it is not fresh"), again},
	} {
		if got := hintOf(c.err, again); got != c.want {
			t.Errorf("%v: %q, want %q", c.err, got, c.want)
		}
	}
}
