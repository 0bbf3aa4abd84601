package cluster

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
)

// Namespace holds the tests' objects.
const Namespace = "e2e"

// APIServer is a kube-apiserver, with a client that has all rights.
type APIServer struct {
	*node.Process
	URL, Token string

	setup  APIServerSetup
	args   []string
	owner  testing.TB // whose end ends the server
	client *http.Client
}

// APIServerSetup is the configuration of a kube-apiserver.
type APIServerSetup struct {
	Binary string
	Host   Host
	// Dir holds its log, its certificates and its keys.
	Dir string
	// Etcds are the URLs of the members.
	Etcds []string
	// EncryptionConfig is the path of an EncryptionConfiguration, or empty. It is reloaded
	// when it changes if Reload is set.
	EncryptionConfig string
	Reload           bool
	// ServiceAccounts is the PEM file of the key that signs tokens, which all servers
	// of a cluster share. If empty, a key is made.
	ServiceAccounts string
	// ClientCA is the path of the certificate authority of clients, if there is one.
	ClientCA string
	// Token is the token of the user with all rights. If empty, a token is made.
	Token string
	// Args are further flags.
	Args []string
}

// NewAPIServer prepares a kube-apiserver without running it.
func NewAPIServer(t testing.TB, s APIServerSetup) *APIServer {
	t.Helper()
	port := "6443"
	if s.Host == Loopback {
		port = node.FreePort(t)
	}
	if s.Token == "" {
		s.Token = rand.Text()
	}
	a := &APIServer{setup: s, URL: "https://" + net.JoinHostPort(s.Host.Address, port), Token: s.Token}
	users := a.write(t, "users.csv", []byte(s.Token+",e2e,e2e,system:masters\n"))
	accounts := s.ServiceAccounts
	if accounts == "" {
		accounts = a.write(t, "accounts.pem", ServiceAccountKey(t))
	}
	a.args = []string{
		"--etcd-servers", strings.Join(s.Etcds, ","), "--bind-address", s.Host.Address, "--secure-port", port,
		"--cert-dir", a.path("certificates"), "--token-auth-file", users,
		"--service-account-issuer", "https://kubernetes.default.svc",
		"--service-account-key-file", accounts, "--service-account-signing-key-file", accounts,
		"--service-cluster-ip-range", "10.0.0.0/24", "--authorization-mode", "RBAC",
		"--endpoint-reconciler-type", "none",
	}
	if s.EncryptionConfig != "" {
		a.args = append(a.args, "--encryption-provider-config", s.EncryptionConfig)
	}
	a.args = append(a.args, s.Args...)
	if s.ClientCA != "" {
		a.args = append(a.args, "--client-ca-file", s.ClientCA)
	}
	if s.Reload {
		a.args = append(a.args, "--encryption-provider-config-automatic-reload=true")
	}
	return a
}

// Patient gives kube-apiserver 10 s for each call of kleidi, instead of 3 s, in the
// EncryptionConfiguration at a path, which it returns. A busy machine may need more than 3 s,
// and kube-apiserver then refuses a request.
func Patient(t testing.TB, path string) string {
	t.Helper()
	former, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	patient := bytes.ReplaceAll(former, []byte("timeout: 3s"), []byte("timeout: 10s"))
	if bytes.Equal(patient, former) {
		t.Fatalf("%s has no timeout of 3 s: %s", path, former)
	}
	if err := os.WriteFile(path, patient, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// ServiceAccountKey makes a key that signs ServiceAccounts' tokens, in PEM.
func ServiceAccountKey(t testing.TB) []byte {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})
}

func (a *APIServer) write(t testing.TB, name string, b []byte) string {
	t.Helper()
	if err := os.WriteFile(a.path(name), b, 0o600); err != nil {
		t.Fatal(err)
	}
	return a.path(name)
}

func (a *APIServer) path(name string) string { return filepath.Join(a.setup.Dir, name) }

// Kubeconfig writes a kubeconfig for the user with all rights, and returns its path.
func (a *APIServer) Kubeconfig(t testing.TB) string {
	t.Helper()
	return a.write(t, "admin.conf", AdminKubeconfig(a.URL, a.path("certificates/apiserver.crt"), a.Token))
}

// Start runs kube-apiserver and returns once it serves unencrypted objects, with or
// without its KMS plugin.
func (a *APIServer) Start(t testing.TB) {
	t.Helper()
	a.Launch(t)
	a.WaitServing(t)
}

// Launch runs kube-apiserver without waiting for it.
func (a *APIServer) Launch(t testing.TB) {
	t.Helper()
	a.owner = t
	a.Process = a.setup.Host.start(t, a.path("kube-apiserver.log"), a.setup.Binary, a.args...)
}

// WaitServing returns once kube-apiserver serves unencrypted objects.
func (a *APIServer) WaitServing(t testing.TB) {
	t.Helper()
	running := Restarts(t)
	node.Eventually(t, 10*time.Minute, "kube-apiserver serves", func() error {
		if err := running(a.Process, func() { a.Launch(a.owner) }); err != nil {
			return err
		}
		if err := a.trust(); err != nil {
			return err
		}
		if err := a.makeNamespace(); err != nil {
			return err
		}
		return a.Put("configmaps", "started", map[string]string{"at": time.Now().String()})
	})
}

// Restarts returns a function that is called until a kube-apiserver serves, and that starts
// it again if it has ended, up to 3 times. It ends if its first steps take 30 s or a minute,
// and kubelet would start it again.
func Restarts(t testing.TB) func(server *node.Process, start func()) error {
	left := 3
	return func(server *node.Process, start func()) error {
		err := server.Alive()
		if err == nil {
			return nil
		}
		t.Helper()
		if left--; left < 0 {
			t.Fatal(err)
		}
		t.Logf("kube-apiserver is started again: %v", err)
		start()
		return err
	}
}

// trust reads the certificate that kube-apiserver made for itself.
func (a *APIServer) trust() error {
	certificates, err := os.ReadFile(a.path("certificates/apiserver.crt"))
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(certificates) {
		return fmt.Errorf("no certificate in apiserver.crt")
	}
	a.client = &http.Client{Timeout: time.Minute, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}}
	return nil
}

// Refusal is an answer of kube-apiserver other than 2xx.
type Refusal struct {
	Code int
	Body string
}

func (r *Refusal) Error() string { return fmt.Sprintf("%d: %s", r.Code, r.Body) }

// Soon makes a call up to 10 times while kube-apiserver does not answer it, or answers that it
// is busy or has failed. A busy machine does not serve each of thousands of calls in time. An
// object that can't be decrypted is an answer.
func Soon(call func() error) error {
	return node.Retry(call, func(err error) bool {
		var r *Refusal
		return errors.As(err, &r) && r.decided()
	})
}

// decided reports whether the same call would be refused again.
func (r *Refusal) decided() bool {
	if strings.Contains(r.Body, "unable to transform") {
		return !strings.Contains(r.Body, "DeadlineExceeded") && !strings.Contains(r.Body, "Unavailable")
	}
	return r.Code < 500 && r.Code != http.StatusTooManyRequests
}

// Get returns an answer as text.
func (a *APIServer) Get(path string) (string, error) {
	b, err := a.call(http.MethodGet, path, nil)
	return string(b), err
}

// Do sends the object in, if not nil, and reads the answer into out.
func (a *APIServer) Do(method, path string, in, out any) error {
	answer, err := a.call(method, path, in)
	if err != nil || out == nil {
		return err
	}
	return json.Unmarshal(answer, out)
}

func (a *APIServer) call(method, path string, in any) ([]byte, error) {
	body, err := json.Marshal(in)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequest(method, a.URL+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+a.Token)
	req.Header.Set("Content-Type", "application/json")
	res, err := a.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	if err != nil {
		return nil, err
	}
	if res.StatusCode/100 != 2 {
		return nil, &Refusal{res.StatusCode, string(answer)}
	}
	return answer, nil
}

func (a *APIServer) makeNamespace() error {
	err := a.Do(http.MethodPost, "/api/v1/namespaces", map[string]any{"metadata": map[string]string{"name": Namespace}}, nil)
	if r, ok := err.(*Refusal); ok && r.Code == http.StatusConflict {
		return nil
	}
	return err
}

// Ready asks for the health checks. One of them makes kube-apiserver probe the KMS
// plugin. The error names the checks that failed.
func (a *APIServer) Ready() error { return a.Do(http.MethodGet, "/readyz?verbose", nil, nil) }

func objects(kind, name string) string {
	return strings.TrimSuffix("/api/v1/namespaces/"+Namespace+"/"+kind+"/"+name, "/")
}

// Put creates or replaces an object. The data of a ConfigMap is text. So is the data of
// a Secret, kept as stringData, so that the stored plaintext is exactly the test's.
func (a *APIServer) Put(kind, name string, data map[string]string) error {
	field := map[string]string{"configmaps": "data", "secrets": "stringData"}[kind]
	object := map[string]any{"metadata": map[string]string{"name": name}, field: data}
	err := a.Do(http.MethodPost, objects(kind, ""), object, nil)
	if r, ok := err.(*Refusal); ok && r.Code == http.StatusConflict {
		return a.Do(http.MethodPut, objects(kind, name), object, nil)
	}
	return err
}

// Secret reads a Secret back.
func (a *APIServer) Secret(name string) (map[string]string, error) {
	var object struct{ Data map[string][]byte }
	if err := a.Do(http.MethodGet, objects("secrets", name), nil, &object); err != nil {
		return nil, err
	}
	data := map[string]string{}
	for k, v := range object.Data {
		data[k] = string(v)
	}
	return data, nil
}

// Rewrite does the same as `kubectl get secrets -o json | kubectl replace -f -`: it
// writes every Secret back as read.
func (a *APIServer) Rewrite() error {
	var list struct {
		Items []struct {
			Metadata map[string]any    `json:"metadata"`
			Data     map[string][]byte `json:"data"`
			Type     string            `json:"type"`
		}
	}
	if err := a.Do(http.MethodGet, objects("secrets", ""), nil, &list); err != nil {
		return err
	}
	for _, item := range list.Items {
		if err := a.Do(http.MethodPut, objects("secrets", fmt.Sprint(item.Metadata["name"])), item, nil); err != nil {
			return err
		}
	}
	return nil
}
