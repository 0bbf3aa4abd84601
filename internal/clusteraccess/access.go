// Package clusteraccess is this node's access to the cluster's API: a kubeconfig, a
// client certificate, and a key in the TPM or in a file.
//
// [Access.SetUp] makes them with an administrator's rights. A running serve asks for the
// next certificate with the node's own rights before the present one ends ([Access.Renew]).
// Only an administrator may approve a request: anyone who may approve requests for this
// signer can get a certificate for any user.
package clusteraccess

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/beezy-dev/kleidi/deploy/cluster"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/ownership"
	"github.com/beezy-dev/kleidi/seal/store/kube"
	"github.com/beezy-dev/kleidi/tpm/attest"
)

// Access is one node's access to the cluster's API. Its methods may be called
// concurrently.
type Access struct {
	// Node is the node's name.
	Node string
	// Kubeconfig is the path of the kubeconfig file. The certificate and the key lie
	// beside it.
	Kubeconfig string
	// Gate provides the TPM.
	Gate *attest.Gate

	mu     sync.Mutex
	client *kube.Client // the result of Client
	state  State
}

// User returns the user name in the node's client certificate.
func (a *Access) User() string { return cluster.User(a.Node) }

// Files returns the paths of all files that SetUp may make.
func (a *Access) Files() []string {
	return []string{a.Kubeconfig, a.beside(extCertificate), a.beside(extKey), a.beside(extTPMKey)}
}

// beside returns the path of a file beside the kubeconfig.
func (a *Access) beside(extension string) string {
	return strings.TrimSuffix(a.Kubeconfig, filepath.Ext(a.Kubeconfig)) + extension
}

// Client returns a client with the rights of the kubeconfig's user, always the same one.
func (a *Access) Client() (*kube.Client, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.client != nil {
		return a.client, nil
	}
	c, err := a.newClient()
	if err != nil {
		return nil, err
	}
	a.client = c
	return c, nil
}

func (a *Access) newClient() (*kube.Client, error) {
	// the file decides which API this node believes
	if err := ownership.CheckFile(a.Kubeconfig); err != nil {
		return nil, err
	}
	k, err := kube.ReadKubeconfig(a.Kubeconfig)
	if err != nil {
		return nil, err
	}
	o := kube.Options{Kubeconfig: a.Kubeconfig}
	if k.KeyFile != "" && k.CertFile != "" {
		o.Certificate = func() (*tls.Certificate, error) { return a.Certificate(context.Background()) }
	}
	return kube.NewClient(o)
}

// Certificate reads the client certificate and its key from the files that the
// kubeconfig names.
func (a *Access) Certificate(ctx context.Context) (*tls.Certificate, error) {
	k, err := a.paths()
	if err != nil {
		return nil, err
	}
	signer, inTPM, err := a.signer(ctx, k.KeyFile)
	if err != nil {
		return nil, err
	}
	b, err := files.ReadOwned(k.CertFile, files.MaxCertificates)
	if err != nil {
		return nil, err
	}
	c, err := files.CertificateFor(signer, b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", k.CertFile, err)
	}
	if !inTPM {
		c.SupportedSignatureAlgorithms = nil // the key supports no others
	}
	return c, nil
}

// errNoFiles is the error for a kubeconfig that an operator wrote for a user without a
// certificate file.
var errNoFiles = errors.New("its user has no certificate in a file")

// paths returns a kubeconfig whose certificate and key are in files.
func (a *Access) paths() (*kube.Kubeconfig, error) {
	k, err := kube.ReadKubeconfig(a.Kubeconfig)
	if err == nil && (k.KeyFile == "" || k.CertFile == "") {
		err = fmt.Errorf("kubeconfig %s: %w", a.Kubeconfig, errNoFiles)
	}
	return k, err
}

// Leaf reads the client certificate, and returns the path of its file. It does not need the
// key.
func (a *Access) Leaf() (c *x509.Certificate, path string, err error) {
	k, err := a.paths()
	if err != nil {
		return nil, "", err
	}
	b, err := files.ReadOwned(k.CertFile, files.MaxCertificates)
	if err != nil {
		return nil, "", err
	}
	c, err = parseLeaf(b)
	if err != nil {
		return nil, "", fmt.Errorf("%s: %w", k.CertFile, err)
	}
	return c, k.CertFile, nil
}

// parseLeaf returns the first certificate of a PEM file.
func parseLeaf(b []byte) (*x509.Certificate, error) {
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("no certificate in PEM")
	}
	return x509.ParseCertificate(block.Bytes)
}

// backdated is by how much kube-controller-manager backdates a certificate.
const backdated = 5 * time.Minute

// margin returns how long before its end a certificate is renewed.
func margin(c *x509.Certificate) time.Duration {
	return min(30*24*time.Hour, max(c.NotAfter.Sub(c.NotBefore)-backdated, 0)/3)
}

// due returns when a certificate is to be renewed.
func due(c *x509.Certificate) time.Time { return c.NotAfter.Add(-margin(c)) }

// check refuses a certificate that is not for this node alone.
func (a *Access) check(c *x509.Certificate) error {
	switch {
	case c.Subject.CommonName != a.User():
		return fmt.Errorf("it is for user %q, not %q", c.Subject.CommonName, a.User())
	case len(c.Subject.Organization) > 0:
		return fmt.Errorf("it is for members of %q, too", c.Subject.Organization)
	}
	return nil
}

// State is the state of a running serve's client certificate.
type State struct {
	// NotAfter is the end of the certificate. It is zero if there is none in a file.
	NotAfter time.Time
	// Problem says why a certificate that ends soon is not renewed yet.
	Problem error
}

// Extensions of the files beside the kubeconfig.
const (
	extCertificate = ".crt"
	extKey         = ".key"    // in PEM
	extTPMKey      = ".tpmkey" // usable only by this TPM
)
