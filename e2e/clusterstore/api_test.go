package clusterstore

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	manifests "github.com/beezy-dev/kleidi/deploy/cluster"
	"github.com/beezy-dev/kleidi/e2e/cluster"
	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/seal/store/kube"
)

// api is a kube-apiserver over an etcd of its own.
type api struct {
	t          *testing.T // both servers end with it
	dir        string
	binaries   map[string]string
	apiserver  string // path of kube-apiserver
	etcd       *node.Process
	etcdArgs   []string
	etcdURL    string
	server     *node.Process
	serverArgs []string
	kubeconfig string // of an administrator
	url        string
	ca         cluster.ClientCA
}

// Versions of kube-apiserver.
const (
	oldest = "kube-apiserver-1.29"
	newest = "kube-apiserver-1.37"
)

// startAPI starts both, and applies the definitions of kleidi's resources. The arguments are
// added to kube-apiserver's.
func startAPI(t *testing.T, args ...string) *api {
	t.Helper()
	return startVersion(t, newest, args...)
}

func startVersion(t *testing.T, version string, args ...string) *api {
	t.Helper()
	binaries, err := cluster.Built("etcd", version, "kube-controller-manager-1.37")
	if err != nil {
		t.Fatal(err)
	}
	a := &api{t: t, dir: t.TempDir(), binaries: binaries, apiserver: binaries[version]}
	client, peer, port := "http://127.0.0.1:"+node.FreePort(t), "http://127.0.0.1:"+node.FreePort(t), node.FreePort(t)
	a.etcdURL = client
	a.etcdArgs = []string{
		"--data-dir", a.path("etcd"), "--unsafe-no-fsync", "--log-level", "warn",
		"--listen-client-urls", client, "--advertise-client-urls", client,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "default=" + peer,
	}
	a.startEtcd(t)
	a.ca = cluster.NewClientCA(t, a.dir)
	token := rand.Text()
	users := a.write(t, "users.csv", []byte(token+",admin,admin,system:masters\n"))
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	accounts := a.write(t, "accounts.pem", pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}))
	a.url = "https://127.0.0.1:" + port
	a.serverArgs = []string{
		"--etcd-servers", client, "--bind-address", "127.0.0.1", "--secure-port", port,
		"--cert-dir", a.path("certificates"), "--token-auth-file", users,
		"--service-account-issuer", "https://kubernetes.default.svc",
		"--service-account-key-file", accounts, "--service-account-signing-key-file", accounts,
		"--service-cluster-ip-range", "10.0.0.0/24", "--authorization-mode", "RBAC", "--endpoint-reconciler-type", "none", "--client-ca-file", a.ca.Certificate,
	}
	a.serverArgs = append(a.serverArgs, args...)
	a.launch()
	a.kubeconfig = a.write(t, "admin.conf", cluster.AdminKubeconfig(a.url, a.path("certificates/apiserver.crt"), token))
	a.waitServing(t)
	c, err := kube.NewClient(kube.Options{Kubeconfig: a.kubeconfig})
	if err != nil {
		t.Fatal(err)
	}
	node.Eventually(t, 10*time.Minute, "the definitions are served", func() error { return c.Apply(t.Context(), manifests.CRDs) })
	return a
}

// launch runs kube-apiserver without waiting for it.
func (a *api) launch() {
	a.t.Helper()
	a.server = node.Start(a.t, a.path("kube-apiserver.log"), a.apiserver, a.serverArgs...)
}

// waitServing returns once kube-apiserver serves.
func (a *api) waitServing(t *testing.T) {
	t.Helper()
	running := cluster.Restarts(t)
	node.Eventually(t, 10*time.Minute, "kube-apiserver serves", func() error {
		if err := running(a.server, a.launch); err != nil {
			return err
		}
		c, err := kube.NewClient(kube.Options{Kubeconfig: a.kubeconfig})
		if err != nil {
			return err
		}
		// A kube-controller-manager gives up if kube-apiserver is not healthy within 10 s.
		return errors.Join(c.Do(t.Context(), http.MethodGet, "/api/v1/namespaces/default", "", nil, nil), c.Do(t.Context(), http.MethodGet, "/healthz", "", nil, nil))
	})
}

// startServer runs a kube-apiserver again after it was killed.
func (a *api) startServer(t *testing.T) {
	t.Helper()
	a.launch()
	a.waitServing(t)
}

func (a *api) path(name string) string { return filepath.Join(a.dir, name) }

func (a *api) write(t *testing.T, name string, b []byte) string {
	t.Helper()
	if err := os.WriteFile(a.path(name), b, 0o600); err != nil {
		t.Fatal(err)
	}
	return a.path(name)
}

func (a *api) startEtcd(t *testing.T) {
	t.Helper()
	a.etcd = node.Start(t, a.path("etcd.log"), a.binaries["etcd"], a.etcdArgs...)
}

// client returns a client with an administrator's rights.
func (a *api) client(t *testing.T, wrap func(http.RoundTripper) http.RoundTripper) *kube.Store {
	t.Helper()
	c, err := kube.NewClient(kube.Options{Kubeconfig: a.kubeconfig, Wrap: wrap})
	if err != nil {
		t.Fatal(err)
	}
	return &kube.Store{Client: c}
}

// stored returns etcd's content below a prefix.
func (a *api) stored(t *testing.T, prefix string) map[string][]byte {
	t.Helper()
	all, err := (&cluster.Etcd{URL: a.etcdURL}).Get(prefix)
	if err != nil {
		t.Fatal(err)
	}
	if len(all) == 0 {
		t.Fatalf("etcd holds nothing below %s", prefix)
	}
	return all
}

// snapshot keeps etcd's data. kube-apiserver runs on while the data is put back.
func (a *api) snapshot(t *testing.T) (restore func()) {
	t.Helper()
	dir, kept := a.path("etcd"), t.TempDir()
	a.etcd.Kill()
	if err := os.CopyFS(kept, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	a.restartEtcd(t)
	return func() {
		t.Helper()
		a.etcd.Kill()
		if err := errors.Join(os.RemoveAll(dir), os.CopyFS(dir, os.DirFS(kept)), os.Chmod(dir, 0o700)); err != nil {
			t.Fatal(err)
		}
		a.restartEtcd(t)
	}
}

func (a *api) restartEtcd(t *testing.T) {
	t.Helper()
	a.startEtcd(a.t)
	s := a.client(t, nil)
	node.Eventually(t, 2*time.Minute, "the API reads from etcd again", func() error { return s.Ping(t.Context()) })
}
