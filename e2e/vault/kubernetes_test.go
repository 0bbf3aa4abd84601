package vault

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"os"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/cluster"
	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/vault"
)

// apiserver is a real kube-apiserver and its etcd.
type apiserver struct {
	*node.Process
	url, token string
	ca         []byte
	client     *http.Client
}

// kubernetesAuth makes Vault ask a real kube-apiserver to review the token
// (TokenReview).
func kubernetesAuth(s *server) vault.Auth {
	s.t.Helper()
	a := startAPIServer(s.t, s)
	s.apiserver = a
	a.reviewer(s.t)
	a.account(s.t, "kleidi")
	s.must("sys/auth/kubernetes", map[string]any{"type": "kubernetes"})
	s.must("auth/kubernetes/config", map[string]any{"kubernetes_host": a.url, "kubernetes_ca_cert": string(a.ca),
		"token_reviewer_jwt": a.serviceToken(s.t, "vault-reviewer", "https://kubernetes.default.svc"), "disable_local_ca_jwt": true})
	s.must("auth/kubernetes/role/kleidi", map[string]any{"bound_service_account_names": "kleidi",
		"bound_service_account_namespaces": "kube-system", "audience": "vault", "token_policies": "kleidi",
		"token_ttl": "1m", "token_no_default_policy": true})
	file := s.write("projected", []byte(a.serviceToken(s.t, "kleidi", "vault")))
	// Kubernetes makes projected tokens readable for their group and for others
	if err := os.Chmod(file, 0o644); err != nil {
		s.t.Fatal(err)
	}
	return vault.Auth{Method: vault.MethodKubernetes, Role: "kleidi", JWTFile: file}
}

func startAPIServer(t *testing.T, s *server) *apiserver {
	t.Helper()
	etcd, peer, port := "http://127.0.0.1:"+node.FreePort(t), "http://127.0.0.1:"+node.FreePort(t), node.FreePort(t)
	node.Start(t, s.path("etcd.log"), binaries["etcd"], "--data-dir", s.path("etcd"), "--unsafe-no-fsync", "--log-level", "warn",
		"--listen-client-urls", etcd, "--advertise-client-urls", etcd,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "default="+peer)
	a := &apiserver{url: "https://127.0.0.1:" + port, token: rand.Text()}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	accounts := s.write("accounts.pem", pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}))
	users := s.write("users.csv", []byte(a.token+",e2e,e2e,system:masters\n"))
	launch := func() {
		a.Process = node.Start(t, s.path("kube-apiserver.log"), binaries["kube-apiserver-1.37"],
			"--etcd-servers", etcd, "--bind-address", "127.0.0.1", "--secure-port", port, "--cert-dir", s.path("kubernetes"),
			"--token-auth-file", users,
			"--service-account-issuer", "https://kubernetes.default.svc", "--service-account-key-file", accounts,
			"--service-account-signing-key-file", accounts, "--service-cluster-ip-range", "10.0.0.0/24",
			"--authorization-mode", "RBAC", "--endpoint-reconciler-type", "none")
	}
	launch()
	running := cluster.Restarts(t)
	node.Eventually(t, 10*time.Minute, "kube-apiserver is ready", func() error {
		if err := running(a.Process, launch); err != nil {
			return err
		}
		return a.ready(s)
	})
	return a
}

func (a *apiserver) ready(s *server) (err error) {
	if a.ca, err = os.ReadFile(s.path("kubernetes/apiserver.crt")); err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(a.ca)
	a.client = &http.Client{Timeout: time.Minute, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, DisableKeepAlives: true}}
	if err := a.do(http.MethodGet, "/readyz", nil, nil); err != nil {
		return err
	}
	return a.do(http.MethodGet, "/api/v1/namespaces/kube-system", nil, nil)
}

// reviewer makes the service account that Vault uses to review tokens.
func (a *apiserver) reviewer(t *testing.T) {
	t.Helper()
	a.account(t, "vault-reviewer")
	a.post(t, "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", map[string]any{
		"metadata": map[string]string{"name": "vault-reviewer"},
		"roleRef":  map[string]string{"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:auth-delegator"},
		"subjects": []map[string]string{{"kind": "ServiceAccount", "name": "vault-reviewer", "namespace": "kube-system"}},
	}, nil)
	as := *a
	as.token = a.serviceToken(t, "vault-reviewer", "https://kubernetes.default.svc")
	node.Eventually(t, 2*time.Minute, "kube-apiserver has noticed the reviewer's rights", func() error {
		return as.do(http.MethodPost, "/apis/authentication.k8s.io/v1/tokenreviews", map[string]any{"spec": map[string]string{"token": as.token}}, nil)
	})
}

func (a *apiserver) account(t *testing.T, name string) {
	t.Helper()
	a.post(t, "/api/v1/namespaces/kube-system/serviceaccounts", map[string]any{"metadata": map[string]string{"name": name}}, nil)
}

// serviceToken asks for a token as the kubelet does for a projected volume.
func (a *apiserver) serviceToken(t *testing.T, account, audience string) string {
	t.Helper()
	var answer struct{ Status struct{ Token string } }
	a.post(t, "/api/v1/namespaces/kube-system/serviceaccounts/"+account+"/token", map[string]any{
		"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
		"spec": map[string]any{"audiences": []string{audience}, "expirationSeconds": 3600}}, &answer)
	return answer.Status.Token
}

func (a *apiserver) post(t *testing.T, path string, in, out any) {
	t.Helper()
	if err := a.do(http.MethodPost, path, in, out); err != nil {
		t.Fatal(err)
	}
}

func (a *apiserver) do(method, path string, in, out any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	req, err := http.NewRequest(method, a.url+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+a.token)
	req.Header.Set("Content-Type", "application/json")
	res, err := a.client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	if err != nil {
		return err
	}
	if res.StatusCode/100 != 2 {
		return fmt.Errorf("%s %s: %d: %s", method, path, res.StatusCode, answer)
	}
	if out == nil {
		return nil
	}
	return json.Unmarshal(answer, out)
}
