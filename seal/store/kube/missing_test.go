package kube

import (
	"crypto/tls"
	"encoding/pem"
	"errors"
	"io"
	"io/fs"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/store"
)

// TestMissingFile: a client without its certificate has asked nobody, so it knows of no
// missing keyring and of no other node's change.
func TestMissingFile(t *testing.T) {
	api := httptest.NewUnstartedServer(http.NotFoundHandler())
	api.Config.ErrorLog = log.New(io.Discard, "", 0)
	api.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
	api.StartTLS()
	defer api.Close()
	dir := t.TempDir()
	k := &Kubeconfig{Server: api.URL, CA: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: api.Certificate().Raw}),
		CertFile: filepath.Join(dir, "cluster.crt"), KeyFile: filepath.Join(dir, "cluster.key")}
	y, err := k.YAML("cp-1")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "kubeconfig")
	for file, content := range map[string][]byte{path: y, k.CertFile: nil, k.KeyFile: nil} {
		if err := os.WriteFile(file, content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c, err := NewClient(Options{Kubeconfig: path, Certificate: func() (*tls.Certificate, error) {
		_, err := os.ReadFile(filepath.Join(dir, "gone.crt"))
		return nil, err
	}})
	if err != nil {
		t.Fatal(err)
	}
	s := &Store{Client: c}
	_, load := s.Load(t.Context())
	_, records := s.Records(t.Context(), "cp-1")
	for what, err := range map[string]error{"load": load, "records": records, "swap": s.Swap(t.Context(), []byte("old"), []byte("new")), "ping": s.Ping(t.Context())} {
		if seal.CauseOf(err) != seal.CauseCredentials || errors.Is(err, fs.ErrNotExist) || errors.Is(err, store.ErrConflict) {
			t.Errorf("%s: %v", what, err)
		}
	}
}
