package cluster

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
)

// ClientCA is the certificate authority of the API's clients, in two PEM files.
type ClientCA struct{ Certificate, Key string }

// NewClientCA makes a certificate authority in a folder.
func NewClientCA(t testing.TB, dir string) ClientCA {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "kubernetes"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
	}
	certificate, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	ca := ClientCA{filepath.Join(dir, "client-ca.crt"), filepath.Join(dir, "client-ca.key")}
	for path, block := range map[string]*pem.Block{ca.Certificate: {Type: "CERTIFICATE", Bytes: certificate}, ca.Key: {Type: "PRIVATE KEY", Bytes: private}} {
		if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return ca
}

// AdminKubeconfig returns a kubeconfig for a token. The server's certificate is its own
// authority.
func AdminKubeconfig(url, authority, token string) []byte {
	return fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: %q, certificate-authority: %q}}]
users: [{name: u, user: {token: %q}}]
contexts: [{name: c, context: {cluster: c, user: u}}]
current-context: c
`, url, authority, token)
}

// StartControllerManager runs the controllers of a kube-controller-manager that sign
// certificates and delete old requests. Each certificate is valid for the given time.
func StartControllerManager(t testing.TB, h Host, binary, dir, kubeconfig string, ca ClientCA, valid time.Duration) *node.Process {
	t.Helper()
	return h.start(t, filepath.Join(dir, "kube-controller-manager.log"), binary,
		"--kubeconfig", kubeconfig, "--controllers", "certificatesigningrequest-signing-controller,certificatesigningrequest-cleaner-controller",
		"--leader-elect=false", "--secure-port", "0", "--cluster-signing-duration", valid.String(),
		"--cluster-signing-cert-file", ca.Certificate, "--cluster-signing-key-file", ca.Key)
}
