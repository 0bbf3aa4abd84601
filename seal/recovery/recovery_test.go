package recovery_test

import (
	"testing"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/recovery"
	"github.com/beezy-dev/kleidi/seal/sealtest"
)

func newOpener(t *testing.T) *recovery.Wrapper {
	t.Helper()
	identity, _, err := recovery.GenerateIdentity(seal.Memory{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { identity.Close() })
	w, err := recovery.NewOpener(seal.Memory{}, identity)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func TestConformance(t *testing.T) {
	sealtest.Run(t, func(t *testing.T) sealtest.Harness {
		return sealtest.Harness{Wrapper: newOpener(t), Other: newOpener(t)}
	})
}
