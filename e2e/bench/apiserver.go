package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const (
	apiserverName = "kube-apiserver-1.37"
	// apiserverLimit bounds the start of a kube-apiserver.
	apiserverLimit = 3 * time.Minute
	namespace      = "bench"
)

// apiserver is a kube-apiserver with its own way to encrypt Secrets, and a client with
// all rights.
type apiserver struct {
	name       string
	dir        string
	url, token string
	pid        int
	stop       func()
	command    []string
	client     *http.Client
	made       int // Secrets
}

// kmsProvider and the functions after it return entries of an EncryptionConfiguration's
// providers.
func kmsProvider(socket string) string {
	return fmt.Sprintf("{kms: {apiVersion: v2, name: bench, endpoint: %q, timeout: 3s}}", "unix://"+socket)
}

func aescbcProvider() string {
	key := make([]byte, 32)
	rand.Read(key)
	return fmt.Sprintf("{aescbc: {keys: [{name: bench, secret: %s}]}}", base64.StdEncoding.EncodeToString(key))
}

const identityProvider = "{identity: {}}"

// startServer runs a program that logs into a file and ends with this program.
func startServer(log, binary string, args ...string) (pid int, stop func(), err error) {
	f, err := os.Create(log)
	if err != nil {
		return 0, nil, err
	}
	defer f.Close()
	cmd := exec.Command(binary, args...)
	cmd.Stdout, cmd.Stderr = f, f
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return 0, nil, err
	}
	return cmd.Process.Pid, func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }, nil
}

// startEtcd runs the etcd that all kube-apiservers share, each with a separate prefix.
func startEtcd(ctx context.Context, binary, dir string) (url string, stop func(), err error) {
	var addresses [2]string
	for i := range addresses {
		if addresses[i], err = freeAddress(); err != nil {
			return "", nil, err
		}
		addresses[i] = "http://" + addresses[i]
	}
	url, peer := addresses[0], addresses[1]
	_, stop, err = startServer(filepath.Join(dir, "etcd.log"), binary, "--data-dir", filepath.Join(dir, "etcd"), "--unsafe-no-fsync",
		"--log-level", "warn", "--listen-client-urls", url, "--advertise-client-urls", url,
		"--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "default="+peer)
	if err != nil {
		return "", nil, err
	}
	err = until(ctx, startLimit, func() error {
		res, err := http.Get(url + "/health")
		if err == nil {
			err = res.Body.Close()
		}
		return err
	})
	if err != nil {
		stop()
	}
	return url, stop, err
}

// startAPIServer runs a kube-apiserver that encrypts Secrets with the first provider, and
// waits until it is ready.
func startAPIServer(ctx context.Context, binary, etcd, dir, name, provider string) (*apiserver, error) {
	a := &apiserver{name: name, dir: filepath.Join(dir, name), token: rand.Text()}
	address, err := freeAddress()
	if err == nil {
		err = os.Mkdir(a.dir, 0o700)
	}
	if err != nil {
		return nil, err
	}
	a.url = "https://" + address
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	providers := provider
	if provider != identityProvider {
		providers += ", " + identityProvider
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, err
	}
	for file, content := range map[string]string{
		"users.csv":       a.token + ",bench,bench,system:masters\n",
		"accounts.pem":    string(pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})),
		"encryption.yaml": "apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfiguration\nresources: [{resources: [secrets], providers: [" + providers + "]}]\n",
	} {
		if err := os.WriteFile(a.path(file), []byte(content), 0o600); err != nil {
			return nil, err
		}
	}
	a.command = []string{binary, "--etcd-servers", etcd, "--etcd-prefix", "/" + name,
		"--bind-address", "127.0.0.1", "--secure-port", port, "--cert-dir", a.path("certificates"), "--token-auth-file", a.path("users.csv"),
		"--service-account-issuer", "https://kubernetes.default.svc", "--service-account-key-file", a.path("accounts.pem"),
		"--service-account-signing-key-file", a.path("accounts.pem"), "--service-cluster-ip-range", "10.0.0.0/24",
		"--authorization-mode", "RBAC", "--endpoint-reconciler-type", "none", "--encryption-provider-config", a.path("encryption.yaml")}
	return a, a.start(ctx)
}

// start runs kube-apiserver, and waits until it is ready.
func (a *apiserver) start(ctx context.Context) (err error) {
	a.pid, a.stop, err = startServer(a.path("log"), a.command[0], a.command[1:]...)
	if err != nil {
		return err
	}
	if err := until(ctx, apiserverLimit, func() error { return a.ready(ctx) }); err != nil {
		a.stop()
		log, _ := os.ReadFile(a.path("log"))
		return fmt.Errorf("kube-apiserver with %s: %w\n%s", a.name, err, log[max(0, len(log)-2000):])
	}
	return nil
}

func (a *apiserver) path(name string) string { return filepath.Join(a.dir, name) }

// ready trusts the certificate that kube-apiserver made for itself, and asks whether it
// is ready and has a namespace.
func (a *apiserver) ready(ctx context.Context) error {
	certificates, err := os.ReadFile(a.path("certificates/apiserver.crt"))
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(certificates) {
		return errors.New("no certificate in apiserver.crt")
	}
	a.client = &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots}, MaxIdleConnsPerHost: max(apiserverCallers, migrateWorkers)}}
	if err := a.call(ctx, http.MethodGet, "/readyz", nil); err != nil {
		return err
	}
	err = a.call(ctx, http.MethodPost, "/api/v1/namespaces", object(namespace, nil))
	if errors.Is(err, errExists) {
		return nil
	}
	return err
}

func object(name string, data map[string][]byte) []byte {
	b, err := json.Marshal(map[string]any{"metadata": map[string]string{"name": name}, "data": data})
	if err != nil {
		panic(err) // strings and bytes always encode
	}
	return b
}

var errExists = errors.New("it exists")

func (a *apiserver) call(ctx context.Context, method, path string, body []byte) error {
	req, err := http.NewRequestWithContext(ctx, method, a.url+path, bytes.NewReader(body))
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
	switch {
	case err != nil:
		return err
	case res.StatusCode == http.StatusConflict:
		return errExists
	case res.StatusCode/100 != 2:
		return fmt.Errorf("%s %s: %s: %.200s", method, path, res.Status, answer)
	}
	return nil
}

// secretSize is the size of a typical Secret, a token or a password, in bytes.
const secretSize = 200

func (a *apiserver) create(ctx context.Context, name string) error {
	return a.call(ctx, http.MethodPost, secrets(""), object(name, map[string][]byte{"password": bytes.Repeat([]byte("x"), secretSize)}))
}

func (a *apiserver) read(ctx context.Context, name string) error {
	return a.call(ctx, http.MethodGet, secrets(name), nil)
}

func secrets(name string) string {
	return strings.TrimSuffix("/api/v1/namespaces/"+namespace+"/secrets/"+name, "/")
}

// built returns the paths of servers, and builds the missing ones.
func built(ctx context.Context, names ...string) ([]string, error) {
	cmd := exec.CommandContext(ctx, "e2e/servers/build", names...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("e2e/servers/build: %w; run it in the repository's root", err)
	}
	paths := strings.Fields(string(out))
	if len(paths) != len(names) {
		return nil, fmt.Errorf("e2e/servers/build prints %q for %q", paths, names)
	}
	return paths, nil
}
