package usage

import (
	"errors"
	"os"
	"path/filepath"

	"github.com/beezy-dev/kleidi/seal"
)

// layout is where a distribution of Kubernetes keeps the client certificate for its etcd.
type layout struct {
	name     string
	endpoint string
	ca       string
	cert     string
	key      string
	// socket is k3s's, if it keeps its objects in another database. The certificate exists
	// then as well, and the socket outlives a change from SQLite to etcd, so the socket
	// counts only while there is no etcdName.
	socket, etcdName string
}

// layouts are those of kubeadm, RKE2 and k3s. kubeadm's certificate for health
// checks has all rights, as kube-apiserver's own has.
var layouts = []layout{
	{name: "kubeadm", endpoint: "https://127.0.0.1:2379", ca: "etc/kubernetes/pki/etcd/ca.crt", cert: "etc/kubernetes/pki/apiserver-etcd-client.crt", key: "etc/kubernetes/pki/apiserver-etcd-client.key"},
	{name: "kubeadm", endpoint: "https://127.0.0.1:2379", ca: "etc/kubernetes/pki/etcd/ca.crt", cert: "etc/kubernetes/pki/etcd/healthcheck-client.crt", key: "etc/kubernetes/pki/etcd/healthcheck-client.key"},
	{name: "RKE2", endpoint: "https://127.0.0.1:2379", ca: "var/lib/rancher/rke2/server/tls/etcd/server-ca.crt", cert: "var/lib/rancher/rke2/server/tls/etcd/client.crt", key: "var/lib/rancher/rke2/server/tls/etcd/client.key"},
	{name: "k3s without etcd", socket: "var/lib/rancher/k3s/server/kine.sock", etcdName: "var/lib/rancher/k3s/server/db/etcd/name"},
	{name: "k3s", endpoint: "https://127.0.0.1:2379", ca: "var/lib/rancher/k3s/server/tls/etcd/server-ca.crt", cert: "var/lib/rancher/k3s/server/tls/etcd/client.crt", key: "var/lib/rancher/k3s/server/tls/etcd/client.key"},
}

// Find returns the etcd of this machine's control plane below root, which is "/". It
// looks where kubeadm, RKE2 and k3s keep the files.
func Find(root string) (*Etcd, error) {
	denied := false
	there := func(path string) bool {
		_, err := os.Stat(filepath.Join(root, path))
		denied = denied || errors.Is(err, os.ErrPermission)
		return err == nil
	}
	for _, l := range layouts {
		if l.socket != "" && there(l.socket) && !there(l.etcdName) {
			return &Etcd{Endpoints: []string{"unix://" + filepath.Join(root, l.socket)}}, nil
		}
		if l.socket == "" && there(l.ca) && there(l.cert) && there(l.key) {
			return &Etcd{Endpoints: []string{l.endpoint}, CAFile: filepath.Join(root, l.ca), CertFile: filepath.Join(root, l.cert), KeyFile: filepath.Join(root, l.key)}, nil
		}
	}
	if denied {
		return nil, &seal.Error{Err: errors.New("etcd's client certificate can be read by root only"), Hint: "run the command as root, or name a file with --snapshot"}
	}
	return nil, seal.Errorf("", "name etcd with --etcd, --cacert, --cert and --key, or a file with --snapshot", "no client certificate for etcd is found where kubeadm, RKE2 and k3s keep it")
}
