package kubernetes

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
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
)

// namespace holds the tests' objects.
const namespace = "e2e"

// apiserver is a kube-apiserver and a client of it with all rights.
type apiserver struct {
	*node.Process
	version    string
	node       *node.Node
	args       []string
	url, token string
	client     *http.Client
}

// newAPIServer prepares a kube-apiserver, which does not run yet.
func newAPIServer(t *testing.T, version string, n *node.Node, e *etcd) *apiserver {
	t.Helper()
	port := node.FreePort(t)
	a := &apiserver{version: version, node: n, url: "https://127.0.0.1:" + port, token: rand.Text()}
	users := a.write(t, "users.csv", []byte(a.token+",e2e,e2e,system:masters\n"))
	accounts := a.write(t, "accounts.pem", serviceAccountKey(t))
	a.args = []string{
		"--etcd-servers", e.url, "--bind-address", "127.0.0.1", "--secure-port", port,
		"--cert-dir", a.node.Path("certificates"), "--token-auth-file", users,
		"--service-account-issuer", "https://kubernetes.default.svc",
		"--service-account-key-file", accounts, "--service-account-signing-key-file", accounts,
		"--service-cluster-ip-range", "10.0.0.0/24", "--authorization-mode", "RBAC",
		"--endpoint-reconciler-type", "none", "--encryption-provider-config", n.EncryptionConfig(),
	}
	return a
}

func serviceAccountKey(t *testing.T) []byte {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})
}

func (a *apiserver) write(t *testing.T, name string, b []byte) string {
	t.Helper()
	if err := os.WriteFile(a.node.Path(name), b, 0o600); err != nil {
		t.Fatal(err)
	}
	return a.node.Path(name)
}

// start runs kube-apiserver and returns once it serves objects that are not
// encrypted, whether or not its KMS plugin is there.
func (a *apiserver) start(t *testing.T) {
	t.Helper()
	a.Process = node.Start(t, a.node.Path("kube-apiserver.log"), binaries[a.version], a.args...)
	node.Eventually(t, 2*time.Minute, a.version+" serves", func() error {
		if err := a.Alive(); err != nil {
			t.Fatal(err)
		}
		if err := a.trust(); err != nil {
			return err
		}
		if err := a.makeNamespace(); err != nil {
			return err
		}
		return a.put("configmaps", "started", map[string]string{"at": time.Now().String()})
	})
}

// trust reads the certificate that kube-apiserver made for itself.
func (a *apiserver) trust() error {
	certificates, err := os.ReadFile(a.node.Path("certificates/apiserver.crt"))
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(certificates) {
		return fmt.Errorf("no certificate in apiserver.crt")
	}
	a.client = &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}}
	return nil
}

// refusal is an answer of kube-apiserver other than 2xx.
type refusal struct {
	code int
	body string
}

func (r *refusal) Error() string { return fmt.Sprintf("%d: %s", r.code, r.body) }

// get returns an answer that is text.
func (a *apiserver) get(path string) (string, error) {
	b, err := a.call(http.MethodGet, path, nil)
	return string(b), err
}

// do sends an object, if there is one, and reads the answer into another.
func (a *apiserver) do(method, path string, in, out any) error {
	answer, err := a.call(method, path, in)
	if err != nil || out == nil {
		return err
	}
	return json.Unmarshal(answer, out)
}

func (a *apiserver) call(method, path string, in any) ([]byte, error) {
	body, err := json.Marshal(in)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequest(method, a.url+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+a.token)
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
		return nil, &refusal{res.StatusCode, string(answer)}
	}
	return answer, nil
}

func (a *apiserver) makeNamespace() error {
	err := a.do(http.MethodPost, "/api/v1/namespaces", map[string]any{"metadata": map[string]string{"name": namespace}}, nil)
	if r, ok := err.(*refusal); ok && r.code == http.StatusConflict {
		return nil
	}
	return err
}

// ready asks for the health checks, among them the one of the KMS plugin,
// which makes kube-apiserver probe it. The error names what is not ready.
func (a *apiserver) ready() error { return a.do(http.MethodGet, "/readyz?verbose", nil, nil) }

func objects(kind, name string) string {
	return strings.TrimSuffix("/api/v1/namespaces/"+namespace+"/"+kind+"/"+name, "/")
}

// put creates or replaces an object. A ConfigMap's data is text, a Secret's too:
// it is kept as stringData, so that a test's plaintext is what is stored.
func (a *apiserver) put(kind, name string, data map[string]string) error {
	field := map[string]string{"configmaps": "data", "secrets": "stringData"}[kind]
	object := map[string]any{"metadata": map[string]string{"name": name}, field: data}
	err := a.do(http.MethodPost, objects(kind, ""), object, nil)
	if r, ok := err.(*refusal); ok && r.code == http.StatusConflict {
		return a.do(http.MethodPut, objects(kind, name), object, nil)
	}
	return err
}

// secret reads a Secret back.
func (a *apiserver) secret(name string) (map[string]string, error) {
	var object struct{ Data map[string][]byte }
	if err := a.do(http.MethodGet, objects("secrets", name), nil, &object); err != nil {
		return nil, err
	}
	data := map[string]string{}
	for k, v := range object.Data {
		data[k] = string(v)
	}
	return data, nil
}

// rewrite does what `kubectl get secrets -o json | kubectl replace -f -` does:
// it writes every Secret back as it was read.
func (a *apiserver) rewrite() error {
	var list struct {
		Items []struct {
			Metadata map[string]any    `json:"metadata"`
			Data     map[string][]byte `json:"data"`
			Type     string            `json:"type"`
		}
	}
	if err := a.do(http.MethodGet, objects("secrets", ""), nil, &list); err != nil {
		return err
	}
	for _, item := range list.Items {
		if err := a.do(http.MethodPut, objects("secrets", fmt.Sprint(item.Metadata["name"])), item, nil); err != nil {
			return err
		}
	}
	return nil
}
