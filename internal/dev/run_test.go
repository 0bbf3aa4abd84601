package dev

import (
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/grpcserver"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/node/nodetest"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/simboot"
)

// TestRun: the first run makes a keyring, and checks it through the socket. The next one
// keeps it. Another boot is locked: the run fails, and says how to open it again.
func TestRun(t *testing.T) {
	dir := t.TempDir()
	var said []string
	run := func(change func(*simboot.Boot)) error {
		t.Helper()
		said = nil
		d := &Dev{Dir: dir, Once: true, Boot: simboot.Baseline(simboot.UKI), Load: func(path string) (*config.Config, error) { return config.Load(path) },
			Log: func(*config.Config) *slog.Logger { return slog.New(slog.DiscardHandler) },
			Say: func(format string, args ...any) { said = append(said, fmt.Sprintf(format, args...)) }}
		change(&d.Boot)
		return d.Run(t.Context())
	}
	says := func(part string) bool {
		return slices.ContainsFunc(said, func(s string) bool { return strings.Contains(s, part) })
	}
	same := func(*simboot.Boot) {}
	if err := run(same); err != nil || !says("sealed: ") || !says("self-check through the socket passed") {
		t.Fatalf("%v, %q", err, said)
	}
	identity, err := os.ReadFile(filepath.Join(dir, "recovery.txt"))
	if err != nil || !strings.HasPrefix(string(identity), "AGE-SECRET-KEY-") {
		t.Errorf("the recovery identity: %v", err)
	}
	if err := run(same); err != nil || !says("the keyring of an earlier run is kept") || says("sealed: ") || !says("self-check through the socket passed") {
		t.Errorf("%v, %q", err, said)
	}
	if now, err := os.ReadFile(filepath.Join(dir, "recovery.txt")); err != nil || string(now) != string(identity) {
		t.Errorf("the recovery identity has changed, %v", err)
	}
	err = run(func(b *simboot.Boot) { b.Kernel = "6.99" })
	if seal.CauseOf(err) != seal.CauseBootState || !says("locked: ") || !says("recover --identity-file "+filepath.Join(dir, "recovery.txt")) {
		t.Errorf("%v, %q", err, said)
	}
}

// TestSelfCheck: the self-check passes only if the socket decrypts what it has encrypted,
// under the key ID that it announces.
func TestSelfCheck(t *testing.T) {
	for name, row := range map[string]struct {
		change func(*keys)
		says   string
	}{
		"whole":                {func(*keys) {}, ""},
		"other plaintext":      {func(k *keys) { k.plaintext = []byte("another") }, "what was decrypted is not what was encrypted"},
		"other key ID":         {func(k *keys) { k.announced = "k1-announced" }, "what was decrypted is not what was encrypted"},
		"nothing is decrypted": {func(k *keys) { k.refuses = seal.ErrAuthentication }, "does not authenticate"},
	} {
		k := &keys{Plugin: nodetest.NewPlugin(t)}
		row.change(k)
		socket := filepath.Join(t.TempDir(), "kms.sock")
		l, err := grpcserver.Listen(grpcserver.ListenConfig{Path: socket})
		if err != nil {
			t.Fatal(err)
		}
		answer(t, k, l)
		var said []string
		err = selfCheck(t.Context(), socket, func(format string, _ ...any) { said = append(said, format) })
		if row.says == "" && err != nil || row.says != "" && (err == nil || !strings.Contains(err.Error(), row.says)) {
			t.Errorf("%s: %v", name, err)
		}
		if passed := len(said) == 1; passed != (row.says == "") {
			t.Errorf("%s: says %q", name, said)
		}
	}
}

// keys are a plugin's, with a fault.
type keys struct {
	*nodetest.Plugin
	plaintext []byte
	announced seal.KeyID
	refuses   error
}

func (k *keys) CurrentID() (seal.KeyID, error) {
	if k.announced != "" {
		return k.announced, nil
	}
	return k.Plugin.CurrentID()
}

func (k *keys) Decrypt(id seal.KeyID, ciphertext []byte) ([]byte, error) {
	if k.refuses != nil {
		return nil, k.refuses
	}
	if k.plaintext != nil {
		return slices.Clone(k.plaintext), nil
	}
	return k.Plugin.Decrypt(id, ciphertext)
}

func answer(t *testing.T, k grpcserver.Keys, l net.Listener) {
	t.Helper()
	s, err := grpcserver.New(k, grpcserver.Options{})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l)
	}()
	t.Cleanup(func() {
		s.GracefulStop(t.Context())
		<-done
	})
}
