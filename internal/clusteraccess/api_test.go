package clusteraccess

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/deploy/cluster"
	"github.com/beezy-dev/kleidi/seal/store/kube"
)

// api is the part of a cluster's API that gives a node its access: certificate requests,
// which it signs, and objects that an administrator applies. e2e/clusterstore has a real one.
type api struct {
	t      testing.TB
	server *httptest.Server
	key    *ecdsa.PrivateKey // of the authority for client certificates
	ca     *x509.Certificate

	mu       sync.Mutex
	requests map[string]*signingRequest
	bindings map[string]bool
	applied  []string // kinds and names
	writes   int      // to the cluster store, by an administrator
	serial   int64    // of the last certificate
	shown    *big.Int // serial number of the last client certificate

	encrypts bool                    // the API encrypts the cluster store itself
	unsigned bool                    // approved requests get no certificate
	asked    func(*signingRequest)   // changes each new request
	approved func(*signingRequest)   // changes each approved request
	template func(*x509.Certificate) // changes each certificate
}

const adminToken = "administrator"

func startAPI(t testing.TB) *api {
	t.Helper()
	a := &api{t: t, requests: map[string]*signingRequest{}, bindings: map[string]bool{}}
	var err error
	if a.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, NotAfter: time.Now().Add(24 * time.Hour), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, a.key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.ca, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	a.server = httptest.NewUnstartedServer(a)
	a.server.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
	a.server.StartTLS()
	t.Cleanup(a.server.Close)
	return a
}

// admin returns the path of a kubeconfig for a bearer token.
func (a *api) admin(token string) string {
	a.t.Helper()
	authority := base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.server.Certificate().Raw}))
	b := fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: %q, certificate-authority-data: %s}}]
users: [{name: u, user: {token: %s}}]
contexts: [{name: c, context: {cluster: c, user: u}}]
current-context: c
`, a.server.URL, authority, token)
	file := filepath.Join(a.t.TempDir(), "admin.conf")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		a.t.Fatal(err)
	}
	return file
}

// user returns who makes a request: the administrator, the user of a client certificate,
// or "".
func (a *api) user(r *http.Request) string {
	if r.Header.Get("Authorization") == "Bearer "+adminToken {
		return adminToken
	}
	if len(r.TLS.PeerCertificates) > 0 && r.TLS.PeerCertificates[0].CheckSignatureFrom(a.ca) == nil {
		a.shown = r.TLS.PeerCertificates[0].SerialNumber
		return r.TLS.PeerCertificates[0].Subject.CommonName
	}
	return ""
}

// ServeHTTP implements http.Handler.
func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if r.URL.Path == "/metrics" {
		if a.encrypts {
			fmt.Fprintf(w, "apiserver_storage_transformation_operations_total{resource=%q,transformation_type=\"to_storage\",transformer_prefix=\"k8s:enc:kms:v2:\"} %d\n", "keyringnodes."+kube.Group, a.writes)
		}
		return
	}
	code, answer := a.answer(r)
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(answer)
}

func refusal(code int, reason string) (int, any) {
	return code, map[string]any{"kind": "Status", "reason": reason, "message": reason}
}

func (a *api) answer(r *http.Request) (int, any) {
	user := a.user(r)
	switch {
	case user == "":
		return refusal(http.StatusUnauthorized, "Unauthorized")
	case strings.HasPrefix(r.URL.Path, requests):
		return a.certificates(r, user)
	case r.Method == http.MethodGet && r.URL.Path == "/apis/"+kube.APIVersion+"/keyrings/cluster":
		return refusal(http.StatusNotFound, "NotFound") // no node has a keyring yet
	case r.Method == http.MethodGet && user == adminToken:
		return http.StatusOK, map[string]any{}
	case user != adminToken:
		return refusal(http.StatusForbidden, "Forbidden")
	case r.Method == http.MethodPatch:
		a.applied = append(a.applied, path.Base(path.Dir(r.URL.Path))+"/"+path.Base(r.URL.Path))
		if r.Header.Get("Content-Type") == kube.MergePatch {
			a.writes++
		}
		return http.StatusOK, map[string]any{}
	case r.Method == http.MethodDelete && a.bindings[path.Base(r.URL.Path)]:
		delete(a.bindings, path.Base(r.URL.Path))
		return http.StatusOK, map[string]any{}
	}
	return refusal(http.StatusNotFound, "NotFound")
}

func (a *api) certificates(r *http.Request, user string) (int, any) {
	name := path.Base(strings.TrimSuffix(r.URL.Path, "/approval"))
	if r.Method == http.MethodPost {
		q := &signingRequest{}
		if err := json.NewDecoder(r.Body).Decode(q); err != nil {
			return refusal(http.StatusBadRequest, err.Error())
		}
		name = q.Metadata["name"].(string)
		if a.requests[name] != nil {
			return refusal(http.StatusConflict, "AlreadyExists")
		}
		if a.asked != nil {
			a.asked(q)
		}
		a.requests[name] = q
		return http.StatusCreated, q
	}
	q := a.requests[name]
	switch {
	case q == nil:
		return refusal(http.StatusNotFound, "NotFound")
	case r.Method == http.MethodGet:
		return http.StatusOK, q
	case user != adminToken:
		return refusal(http.StatusForbidden, "Forbidden")
	case r.Method == http.MethodDelete:
		delete(a.requests, name)
		return http.StatusOK, q
	}
	a.approve(q)
	return http.StatusOK, q
}

// approve signs a request, as kube-controller-manager does after the approval.
func (a *api) approve(q *signingRequest) {
	q.Status.Conditions = append(q.Status.Conditions, condition{Type: "Approved", Status: "True"})
	if !a.unsigned {
		block, _ := pem.Decode(q.Spec.Request)
		c, err := x509.ParseCertificateRequest(block.Bytes)
		if err != nil {
			a.t.Error(err)
			return
		}
		q.Status.Certificate = a.sign(c.Subject, c.PublicKey)
	}
	if a.approved != nil {
		a.approved(q)
	}
}

func (a *api) sign(subject pkix.Name, key any) []byte {
	now := time.Now()
	a.serial++
	c := &x509.Certificate{SerialNumber: big.NewInt(a.serial), Subject: subject, NotBefore: now.Add(-backdated), NotAfter: now.Add(365 * 24 * time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	if a.template != nil {
		a.template(c)
	}
	der, err := x509.CreateCertificate(rand.Reader, c, a.ca, key, a.key)
	if err != nil {
		a.t.Error(err)
		return nil
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// pending returns the node's request, or nil.
func (a *api) pending(node string) *signingRequest {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.requests[cluster.RequestName(node)]
}

// objects returns what an administrator has applied.
func (a *api) objects() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.applied)
}

// bound reports whether a node has the rights of its role.
func (a *api) bound(node string) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.bindings[cluster.BindingName(node)]
}

// change changes the API.
func (a *api) change(f func()) {
	a.mu.Lock()
	defer a.mu.Unlock()
	f()
}

// shortLived is a certificate that is to be renewed.
func shortLived(c *x509.Certificate) {
	c.NotBefore, c.NotAfter = time.Now().Add(-24*time.Hour), time.Now().Add(time.Hour)
}
