package lifecycle

import (
	"log/slog"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// TestNothingBesideBoth: if two wrappers must open together, a rotation makes no slot
// that opens alone. It makes no slot of the TPM either, because it would trust whatever
// TPM is present.
func TestNothingBesideBoth(t *testing.T) {
	cfg := config.Default()
	cfg.Unlock.Order = []string{seal.TypeTPM, seal.TypePKCS11}
	n, err := node.New(cfg, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	for kind, refused := range map[string]bool{seal.TypeTPMAndPKCS11: false, seal.TypeRecovery: true} {
		kek, err := n.Memory.NewKEK()
		if err != nil {
			t.Fatal(err)
		}
		k, err := keyring.New(seal.ClusterID{1}, kek, []seal.Slot{{Type: kind, Node: cfg.Node, Data: []byte("{}")}}, nil, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		defer k.Close()
		// No token is configured, so a try to make that slot fails.
		if got, err := addMissing(t.Context(), n, k, nil); (err != nil) != refused || !refused && got != k {
			t.Errorf("beside %s: %v, %v", kind, got, err)
		}
	}
}
