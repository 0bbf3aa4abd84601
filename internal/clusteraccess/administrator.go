package clusteraccess

import (
	"os"
	"path/filepath"
)

// AdminKubeconfig returns the administrator's kubeconfig on this node where kubeadm, RKE2
// or k3s keeps it, or "".
func AdminKubeconfig() string { return adminKubeconfigBelow("/") }

func adminKubeconfigBelow(root string) string {
	for _, path := range []string{"/etc/kubernetes/admin.conf", "/etc/rancher/rke2/rke2.yaml", "/etc/rancher/k3s/k3s.yaml"} {
		path = filepath.Join(root, path)
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	return ""
}
