package clusterstore

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/cluster"
	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/seal/store/kube"
)

const request = "/apis/certificates.k8s.io/v1/certificatesigningrequests/kleidi-node-cp-1"

// approve approves the node's request, as kubectl certificate approve does.
func (a *api) approve(t *testing.T) error {
	t.Helper()
	c := as(t, a.kubeconfig)
	var r map[string]any
	if err := c.Do(t.Context(), http.MethodGet, request, "", nil, &r); err != nil {
		return err
	}
	r["status"] = map[string]any{"conditions": []any{map[string]string{"type": "Approved", "status": "True", "reason": "Test", "message": "test"}}}
	return c.Do(t.Context(), http.MethodPut, request+"/approval", kube.JSON, r, nil)
}

// remark waits until a node's readyz, which stays good, contains a text, or no longer
// contains it.
func remark(t *testing.T, n *node.Node, text string, there bool) {
	t.Helper()
	node.Eventually(t, 10*time.Minute, fmt.Sprintf("readyz says %q: %t", text, there), func() error {
		code, body, err := n.Get("/readyz?verbose")
		if err == nil && (code != http.StatusOK || strings.Contains(body, text) != there) {
			err = fmt.Errorf("%d %s", code, body)
		}
		return err
	})
}

// end returns the end of the certificate in a file.
func end(t *testing.T, path string) time.Time {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return c.NotAfter
}

// certificateTime is how long a certificate is valid. kleidi renews it in the last third. This
// time is enough for the steps of TestRenew on a busy machine.
const certificateTime = 8 * time.Minute

// TestRenew: a node asks for its next certificate before the present one ends, with its
// own rights, and takes it once an administrator has approved it. It takes no certificate
// for another key.
func TestRenew(t *testing.T) {
	a := startAPI(t)
	cluster.StartControllerManager(t, cluster.Loopback, a.binaries["kube-controller-manager-1.37"], a.dir, a.kubeconfig, a.ca, certificateTime)
	n := node.Make(t, node.Setup{Settings: "node: cp-1\n"})
	r := a.setUp(t, n)
	n.Configure("node: cp-1\ncluster:\n  kubeconfig: " + r.Kubeconfig + "\n")
	admin := as(t, a.kubeconfig)
	remove(t, admin, request) // as kube-controller-manager does within the hour
	n.ServeOpen()
	first := end(t, r.Certificate)

	remark(t, n, "request kleidi-node-cp-1 waits for an administrator's approval", true)
	if _, body, err := n.Get("/metrics"); err != nil || !strings.Contains(body, fmt.Sprintf("kleidi_cluster_certificate_end_timestamp_seconds %g", float64(first.Unix()))) {
		t.Errorf("the metrics do not say when the certificate ends: %v", err)
	}

	t.Log("somebody puts another request in its place")
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "kleidi:node:cp-1"}}, key)
	if err != nil {
		t.Fatal(err)
	}
	foreign := map[string]any{
		"apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest", "metadata": map[string]string{"name": "kleidi-node-cp-1"},
		"spec": map[string]any{"request": pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), "signerName": "kubernetes.io/kube-apiserver-client", "usages": []string{"client auth"}},
	}
	node.Eventually(t, 2*time.Minute, "the other request is made", func() error { // kleidi may be faster, and ask again
		if err := admin.Do(t.Context(), http.MethodDelete, request, "", nil, nil); err != nil && !kube.Refused(err, http.StatusNotFound) {
			return err
		}
		return admin.Do(t.Context(), http.MethodPost, "/apis/certificates.k8s.io/v1/certificatesigningrequests", kube.JSON, foreign, nil)
	})
	if err := soon(func() error { return a.approve(t) }); err != nil {
		t.Fatal(err)
	}
	remark(t, n, "is not for this node's key", true)
	if !end(t, r.Certificate).Equal(first) {
		t.Error("the node takes a certificate of another key")
	}

	t.Log("an administrator approves")
	remove(t, admin, request)
	node.Eventually(t, 10*time.Minute, "the request is approved", func() error { return a.approve(t) })
	node.Eventually(t, 10*time.Minute, "the certificate is renewed", func() error {
		if !end(t, r.Certificate).After(first) {
			return errors.New("it is the first one")
		}
		return nil
	})
	remark(t, n, "client certificate", false)

	t.Log("cluster setup replaces a certificate that ends soon")
	remark(t, n, "client certificate", true)
	second := end(t, r.Certificate)
	if r := a.setUp(t, n); len(r.Changes) != 1 || !end(t, r.Certificate).After(second) {
		t.Errorf("cluster setup: %q", r.Changes)
	}
	remark(t, n, "client certificate", false)
}
