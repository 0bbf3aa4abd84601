package clusteraccess

import (
	"os"
	"path/filepath"
	"testing"
)

// TestAdminKubeconfig: each distribution's file is found, and kubeadm's comes first.
func TestAdminKubeconfig(t *testing.T) {
	root := t.TempDir()
	if got := adminKubeconfigBelow(root); got != "" {
		t.Errorf("no file: %q", got)
	}
	for _, name := range []string{"etc/rancher/k3s/k3s.yaml", "etc/rancher/rke2/rke2.yaml", "etc/kubernetes/admin.conf"} {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if got := adminKubeconfigBelow(root); got != path {
			t.Errorf("with %s: %q", name, got)
		}
	}
}
