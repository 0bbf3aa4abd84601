package kube

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestReconnect: once the API refuses a certificate, the next call presents the
// certificate of that time, on another connection.
func TestReconnect(t *testing.T) {
	api := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.TLS.PeerCertificates[0].SerialNumber.Int64() == 1 {
			w.WriteHeader(http.StatusUnauthorized)
		}
	}))
	api.TLS = &tls.Config{ClientAuth: tls.RequireAnyClientCert}
	api.EnableHTTP2 = true
	api.StartTLS()
	defer api.Close()
	k := &Kubeconfig{Server: api.URL, CA: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: api.Certificate().Raw})}
	path := write(t, k)
	serial := int64(1)
	c, err := NewClient(Options{Kubeconfig: path, Certificate: func() (*tls.Certificate, error) { return certificate(t, serial), nil }})
	if err != nil {
		t.Fatal(err)
	}
	ask := func() error { return c.Do(t.Context(), http.MethodGet, "/", "", nil, nil) }
	for range 2 {
		if err := ask(); !Refused(err, http.StatusUnauthorized) {
			t.Fatalf("with the first certificate: %v", err)
		}
	}
	serial = 2
	if err := ask(); err != nil {
		t.Errorf("with the second certificate: %v", err)
	}
}

func certificate(t *testing.T, serial int64) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(serial), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// TestKubeconfig: a kubeconfig that was written is read back, with this machine's address
// or another.
func TestKubeconfig(t *testing.T) {
	k := &Kubeconfig{Server: "https://192.0.2.1:6443", CA: []byte("ca")}
	local := k.Local()
	if local.Server != "https://127.0.0.1:6443" || local.ServerName != "192.0.2.1" {
		t.Fatalf("local: %+v", local)
	}
	if again := local.Local(); again != nil {
		t.Errorf("local of local: %+v", again)
	}
	got, err := ReadKubeconfig(write(t, local))
	if err != nil || got.Server != local.Server || got.ServerName != local.ServerName || string(got.CA) != "ca" || got.CertFile != local.CertFile || got.KeyFile != local.KeyFile {
		t.Errorf("read back: %+v, %v", got, err)
	}
	if _, err := k.At("http://192.0.2.2"); err == nil {
		t.Error("a server without TLS is taken")
	}
	if at, err := k.At("https://192.0.2.1:443"); err != nil || at.ServerName != "" {
		t.Errorf("the same host: %+v, %v", at, err)
	}
}

// write writes a kubeconfig, whose certificate and key are files beside it.
func write(t *testing.T, k *Kubeconfig) string {
	t.Helper()
	dir := t.TempDir()
	k.CertFile, k.KeyFile = filepath.Join(dir, "client.crt"), filepath.Join(dir, "client.key")
	b, err := k.YAML("user")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "kubeconfig")
	for path, b := range map[string][]byte{path: b, k.CertFile: nil, k.KeyFile: nil} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return path
}
