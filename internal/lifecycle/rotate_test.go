package lifecycle

import (
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/node/nodetest"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// TestNothingBesideBoth: if two wrappers must open together, a rotation makes no slot
// that opens alone. It makes no slot of the TPM either, because it would trust whatever
// TPM is present.
func TestNothingBesideBoth(t *testing.T) {
	n := nodetest.New(t, func(c *config.Config) { c.Unlock.Order = []string{seal.TypeTPM, seal.TypePKCS11} })
	for kind, refused := range map[string]bool{seal.TypeTPMAndPKCS11: false, seal.TypeRecovery: true} {
		kek, err := n.Memory.NewKEK()
		if err != nil {
			t.Fatal(err)
		}
		k, err := keyring.New(seal.ClusterID{1}, kek, []seal.Slot{{Type: kind, Node: n.Config.Node, Data: []byte("{}")}}, []keyring.Node{{Name: n.Config.Node}}, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		defer k.Close()
		// No token is configured, so an attempt to make that slot fails.
		if got, err := addMissing(t.Context(), n, k, nil); (err != nil) != refused || !refused && got != k {
			t.Errorf("beside %s: %v, %v", kind, got, err)
		}
	}
}
