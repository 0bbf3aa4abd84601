package kube

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"

	"go.yaml.in/yaml/v3"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/beezy-dev/kleidi/internal/regular"
)

// Kubeconfig is the part of a kubeconfig file that kleidi copies or replaces.
type Kubeconfig struct {
	// Server is the URL of the API.
	Server string
	// ServerName is the name that the API's certificate must have, if that is not the
	// host of Server.
	ServerName string
	// CA holds certificates in PEM. Without them, the system's certificate authorities
	// are trusted.
	CA []byte
	// CertFile and KeyFile are the paths of the client certificate and its key, if
	// they are in files.
	CertFile, KeyFile string
}

// load reads a kubeconfig. client-go opens the files itself, also those that the kubeconfig
// names, so load first refuses a path that would block it.
func load(path string) (*rest.Config, error) {
	if err := regular.Check(path); err != nil {
		return nil, err
	}
	c, err := clientcmd.BuildConfigFromFlags("", path)
	switch {
	case clientcmd.IsEmptyConfig(err):
		return nil, errors.New("it names no cluster") // client-go speaks of a variable that kleidi does not read
	case err != nil:
		return nil, err
	}
	return c, regular.Check(c.CAFile, c.CertFile, c.KeyFile, c.BearerTokenFile)
}

// ReadKubeconfig reads a kubeconfig file, and the file of the certificate authority
// that it names.
func ReadKubeconfig(path string) (*Kubeconfig, error) {
	c, err := load(path)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig %s: %w", path, err)
	}
	k := &Kubeconfig{Server: c.Host, ServerName: c.TLSClientConfig.ServerName, CertFile: c.CertFile, KeyFile: c.KeyFile}
	if len(c.CertData) > 0 {
		k.CertFile = ""
	}
	if len(c.KeyData) > 0 {
		k.KeyFile = ""
	}
	if u, err := url.Parse(c.Host); err != nil || u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("kubeconfig %s: its server is %q; want a URL with https", path, c.Host)
	}
	if k.CA = c.CAData; len(k.CA) == 0 && c.CAFile != "" {
		if k.CA, err = os.ReadFile(c.CAFile); err != nil {
			return nil, fmt.Errorf("kubeconfig %s: certificate authority: %w", path, err)
		}
	}
	return k, nil
}

// At returns the same API at another URL. The API's certificate must still have the
// name that it has at the present URL.
func (k *Kubeconfig) At(server string) (*Kubeconfig, error) {
	u, err := url.Parse(server)
	if err != nil || u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("server %q; want a URL with https, such as https://127.0.0.1:6443", server)
	}
	at := *k
	at.Server = server
	if at.ServerName == "" {
		if at.ServerName = k.hostname(); at.ServerName == u.Hostname() {
			at.ServerName = ""
		}
	}
	return &at, nil
}

// Local returns the same API on this machine's loopback, or nil if k has that address
// already.
func (k *Kubeconfig) Local() *Kubeconfig {
	if ip := net.ParseIP(k.hostname()); ip != nil && ip.IsLoopback() || k.hostname() == "localhost" {
		return nil
	}
	_, port, _ := net.SplitHostPort(k.Address())
	local, err := k.At("https://" + net.JoinHostPort("127.0.0.1", port))
	if err != nil {
		return nil
	}
	return local
}

func (k *Kubeconfig) hostname() string {
	u, err := url.Parse(k.Server)
	if err != nil {
		return ""
	}
	return u.Hostname()
}

// Address returns the host and port of the API.
func (k *Kubeconfig) Address() string {
	u, err := url.Parse(k.Server)
	if err != nil {
		return ""
	}
	return net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), "443"))
}

// Dial proves that the API answers at k's address.
func (k *Kubeconfig) Dial(ctx context.Context) error {
	c := &tls.Config{ServerName: cmp.Or(k.ServerName, k.hostname()), MinVersion: tls.VersionTLS12}
	if len(k.CA) > 0 {
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(k.CA) {
			return errors.New("the certificate authority has no certificate in PEM")
		}
	}
	d := tls.Dialer{Config: c}
	conn, err := d.DialContext(ctx, "tcp", k.Address())
	if err != nil {
		return err
	}
	return conn.Close()
}

// YAML returns the file for a user whose certificate and key are in files.
func (k *Kubeconfig) YAML(user string) ([]byte, error) {
	cluster := map[string]string{"server": k.Server}
	if k.ServerName != "" {
		cluster["tls-server-name"] = k.ServerName
	}
	if len(k.CA) > 0 {
		cluster["certificate-authority-data"] = base64.StdEncoding.EncodeToString(k.CA)
	}
	return yaml.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "Config", "current-context": "kleidi",
		"clusters": []any{map[string]any{"name": "cluster", "cluster": cluster}},
		"users":    []any{map[string]any{"name": user, "user": map[string]string{"client-certificate": k.CertFile, "client-key": k.KeyFile}}},
		"contexts": []any{map[string]any{"name": "kleidi", "context": map[string]string{"cluster": "cluster", "user": user}}},
	})
}
