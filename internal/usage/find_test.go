package usage

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestFind: the certificates of each distribution are found in their usual place.
func TestFind(t *testing.T) {
	for name, tc := range map[string]struct {
		files []string
		want  string // the certificate, or the socket
	}{
		"kubeadm": {[]string{"etc/kubernetes/pki/etcd/ca.crt", "etc/kubernetes/pki/apiserver-etcd-client.crt", "etc/kubernetes/pki/apiserver-etcd-client.key",
			"etc/kubernetes/pki/etcd/healthcheck-client.crt", "etc/kubernetes/pki/etcd/healthcheck-client.key"}, "etc/kubernetes/pki/apiserver-etcd-client.crt"},
		"kubeadm, etcd's own host": {[]string{"etc/kubernetes/pki/etcd/ca.crt", "etc/kubernetes/pki/etcd/healthcheck-client.crt", "etc/kubernetes/pki/etcd/healthcheck-client.key"},
			"etc/kubernetes/pki/etcd/healthcheck-client.crt"},
		"RKE2": {[]string{"var/lib/rancher/rke2/server/tls/etcd/server-ca.crt", "var/lib/rancher/rke2/server/tls/etcd/client.crt", "var/lib/rancher/rke2/server/tls/etcd/client.key"},
			"var/lib/rancher/rke2/server/tls/etcd/client.crt"},
		"k3s": {[]string{"var/lib/rancher/k3s/server/tls/etcd/server-ca.crt", "var/lib/rancher/k3s/server/tls/etcd/client.crt", "var/lib/rancher/k3s/server/tls/etcd/client.key"},
			"var/lib/rancher/k3s/server/tls/etcd/client.crt"},
		"k3s with another database": {[]string{"var/lib/rancher/k3s/server/kine.sock"}, "unix://var/lib/rancher/k3s/server/kine.sock"},
		// k3s makes the certificate although there is no etcd
		"k3s with SQLite": {[]string{"var/lib/rancher/k3s/server/kine.sock", "var/lib/rancher/k3s/server/tls/etcd/server-ca.crt",
			"var/lib/rancher/k3s/server/tls/etcd/client.crt", "var/lib/rancher/k3s/server/tls/etcd/client.key"}, "unix://var/lib/rancher/k3s/server/kine.sock"},
		"k3s that was moved from SQLite to etcd": {[]string{"var/lib/rancher/k3s/server/kine.sock", "var/lib/rancher/k3s/server/db/etcd/name", "var/lib/rancher/k3s/server/tls/etcd/server-ca.crt",
			"var/lib/rancher/k3s/server/tls/etcd/client.crt", "var/lib/rancher/k3s/server/tls/etcd/client.key"}, "var/lib/rancher/k3s/server/tls/etcd/client.crt"},
		"half of kubeadm": {[]string{"etc/kubernetes/pki/etcd/ca.crt"}, ""},
	} {
		root := t.TempDir()
		for _, f := range tc.files {
			path := filepath.Join(root, f)
			if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		e, err := Find(root)
		if tc.want == "" {
			if err == nil || !strings.Contains(err.Error(), "name etcd with --etcd, --cacert, --cert and --key, or a file with --snapshot") {
				t.Errorf("%s: %+v, %v", name, e, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		got := e.CertFile
		if got == "" {
			got = e.Endpoints[0]
		}
		if got = strings.ReplaceAll(got, root+"/", ""); got != tc.want {
			t.Errorf("%s: %s, want %s", name, got, tc.want)
		}
	}
}
