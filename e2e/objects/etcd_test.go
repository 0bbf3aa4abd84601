package objects

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/cluster"
	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/internal/usage"
	"github.com/beezy-dev/kleidi/internal/usage/usagetest"
)

// authority makes certificates into a folder.
type authority struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T, dir string) *authority {
	t.Helper()
	a := &authority{t: t, dir: dir}
	a.cert, a.key = a.make("ca", &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign})
	return a
}

// make writes NAME.crt and NAME.key.
func (a *authority) make(name string, c *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	c.SerialNumber, c.Subject = big.NewInt(time.Now().UnixNano()), pkix.Name{CommonName: name}
	c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = c, key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), signer)
	if err != nil {
		a.t.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	for ext, block := range map[string]*pem.Block{".crt": {Type: "CERTIFICATE", Bytes: der}, ".key": {Type: "PRIVATE KEY", Bytes: private}} {
		if err := os.WriteFile(filepath.Join(a.dir, name+ext), pem.EncodeToMemory(block), 0o600); err != nil {
			a.t.Fatal(err)
		}
	}
	made, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return made, key
}

// TestEtcdOverTLS: an etcd that demands client certificates is read with those that
// kubeadm keeps, in pages, even if a page of values is larger than an answer may be.
func TestEtcdOverTLS(t *testing.T) {
	binaries, err := cluster.Built("etcd")
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	pki := filepath.Join(root, "etc/kubernetes/pki/etcd")
	if err := os.MkdirAll(pki, 0o700); err != nil {
		t.Fatal(err)
	}
	ca := newAuthority(t, pki)
	ca.make("server", &x509.Certificate{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}})
	ca.make("healthcheck-client", &x509.Certificate{ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	other := newAuthority(t, t.TempDir())

	plain, secure, peer := "http://127.0.0.1:"+node.FreePort(t), "https://127.0.0.1:"+node.FreePort(t), "http://127.0.0.1:"+node.FreePort(t)
	node.Start(t, filepath.Join(root, "etcd.log"), binaries["etcd"], "--data-dir", filepath.Join(root, "etcd"), "--unsafe-no-fsync", "--log-level", "warn",
		"--listen-client-urls", plain+","+secure, "--advertise-client-urls", secure, "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer, "--initial-cluster", "default="+peer,
		"--cert-file", pki+"/server.crt", "--key-file", pki+"/server.key", "--trusted-ca-file", pki+"/ca.crt", "--client-cert-auth")
	etcd := &cluster.Etcd{URL: plain}
	node.Eventually(t, 2*time.Minute, "etcd answers", func() error { _, err := etcd.Get("/registry/"); return err })
	put := func(key string, value []byte) {
		t.Helper()
		if err := etcd.Put(key, value); err != nil {
			t.Fatal(err)
		}
	}
	const large, small = 40, 600
	for i := range large { // 44 MiB together
		put(fmt.Sprintf("/registry/configmaps/a/%d", i), append(usagetest.Encrypted("kleidi", "k1-large"), bytes.Repeat([]byte("\x78\x01"), 550_000)...))
	}
	for i := range small {
		put(fmt.Sprintf("/registry/secrets/a/%d", i), usagetest.Encrypted("kleidi", "k1-small"))
	}
	put("/elsewhere/1", usagetest.Encrypted("kleidi", "k1-small"))
	put("zzz", []byte("another program's"))

	found, err := usage.Find(root)
	if err != nil {
		t.Fatal(err)
	}
	found.Endpoints = []string{"https://127.0.0.1:1", secure} // the first member is away
	r, err := found.Read(t.Context(), usage.DefaultPrefix, nil)
	if err != nil {
		t.Fatal(err)
	}
	if ids := r.KeyIDs(); ids["k1-large"] != large || ids["k1-small"] != small+1 || r.Others != 1 || r.Objects != large+small+1 {
		t.Errorf("%v, %d others, %d objects", ids, r.Others, r.Objects)
	}

	for name, tc := range map[string]struct {
		etcd usage.Etcd
		want string
	}{
		"no client certificate": {usage.Etcd{Endpoints: []string{secure}, CAFile: found.CAFile}, "--cert and --key"},
		"another authority":     {usage.Etcd{Endpoints: []string{secure}, CAFile: other.dir + "/ca.crt", CertFile: found.CertFile, KeyFile: found.KeyFile}, "name etcd's CA with --cacert"},
		"the wrong key":         {usage.Etcd{Endpoints: []string{secure}, CAFile: found.CAFile, CertFile: found.CertFile, KeyFile: pki + "/server.key"}, "client certificate: "},
		"no authority":          {usage.Etcd{Endpoints: []string{secure}, CAFile: found.KeyFile, CertFile: found.CertFile, KeyFile: found.KeyFile}, "holds no certificate in PEM"},
		"without TLS":           {usage.Etcd{Endpoints: []string{strings.Replace(secure, "https", "http", 1)}}, "name its members with --etcd"},
		"no such prefix":        {usage.Etcd{Endpoints: []string{plain}}, "name kube-apiserver's --etcd-prefix with --prefix"},
	} {
		prefix := usage.DefaultPrefix
		if name == "no such prefix" {
			prefix = "/kubernetes"
		}
		if _, err := tc.etcd.Read(t.Context(), prefix, nil); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
}

// TestEtcdVersions: running servers and snapshots of older versions of etcd are counted
// like those of the newest.
func TestEtcdVersions(t *testing.T) {
	binaries, err := cluster.Built("etcd-3.5", "etcd")
	if err != nil {
		t.Fatal(err)
	}
	for want, binary := range map[string]string{"3.5": binaries["etcd-3.5"], "3.6": binaries["etcd"]} {
		t.Run(want, func(t *testing.T) { countOf(t, binary, want) })
	}
}

// countOf counts the objects of an etcd, live and in a snapshot.
func countOf(t *testing.T, binary, version string) {
	dir := t.TempDir()
	etcd := cluster.StartEtcd(t, binary, dir)
	const secrets = 700
	for i := range 2 * secrets { // each twice
		key := fmt.Sprint("/registry/secrets/a/", i%secrets)
		if err := etcd.Put(key, usagetest.Encrypted("kleidi", fmt.Sprint("k1-round-", i/secrets))); err != nil {
			t.Fatal(err)
		}
	}
	live := &usage.Etcd{Endpoints: []string{etcd.URL}}
	r, err := live.Read(t.Context(), usage.DefaultPrefix, nil)
	if err != nil || len(r.KeyIDs()) != 1 || r.KeyIDs()["k1-round-1"] != secrets {
		t.Fatalf("live: %+v, %v", r, err)
	}
	file := filepath.Join(dir, "snapshot.db")
	etcd.Snapshot(t, file)
	r, err = usage.Snapshot(t.Context(), file, usage.DefaultPrefix, nil)
	if err != nil || len(r.KeyIDs()) != 1 || r.KeyIDs()["k1-round-1"] != secrets || r.Snapshot.Etcd != version || !r.Snapshot.Checked || r.Snapshot.Revisions < 2*secrets {
		t.Fatalf("snapshot: %+v, %v", r, err)
	}
}
