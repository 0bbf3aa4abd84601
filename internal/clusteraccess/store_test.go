package clusteraccess

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"
	"testing"

	"github.com/beezy-dev/kleidi/seal/replica"
)

// TestStoreWithoutKubeconfig: a missing kubeconfig must not look like a store
// without a keyring, which a node would fill.
func TestStoreWithoutKubeconfig(t *testing.T) {
	s := (&Access{Node: "cp-1", Kubeconfig: filepath.Join(t.TempDir(), "none")}).Store()
	ctx, cancel := context.WithCancel(t.Context())
	calls := map[string]func() error{
		"Load":      func() error { _, err := s.Load(ctx); return err },
		"Swap":      func() error { return s.Swap(ctx, nil, []byte("{}")) },
		"Records":   func() error { _, err := s.Records(ctx, "cp-1"); return err },
		"PutRecord": func() error { return s.PutRecord(ctx, "cp-1", []byte("{}")) },
	}
	for name, call := range calls {
		if err := call(); !errors.Is(err, replica.ErrNoStore) || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %v", name, err)
		}
	}
	cancel()
	s.Watch(ctx, func() { t.Error("nothing changed") })
	if len(summarize([]byte("damaged")))+len(summarizeRecord([]byte("damaged"), nil)) != 0 {
		t.Error("what can't be read has a summary")
	}
}
