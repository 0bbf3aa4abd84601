package encryptionconfig

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"

	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/seal"
)

// commandLines are files that hold kube-apiserver's command line: its static pod where
// kubeadm and RKE2 run it, and k3s's configuration.
var commandLines = []string{
	"etc/kubernetes/manifests/kube-apiserver.yaml",
	"var/lib/rancher/rke2/agent/pod-manifests/kube-apiserver.yaml",
	"etc/rancher/k3s/config.yaml",
}

// usual are the paths of kube-apiserver's file to try if no command line is found.
var usual = []string{
	"etc/kubernetes/kleidi-encryption.yaml",
	"var/lib/rancher/k3s/server/cred/encryption-config.json",
}

// flagged matches this flag, but not the flag for the automatic reload. Its value may be the
// next item of a list: there only the form with dashes counts, because a volume can have the
// bare name.
var flagged = regexp.MustCompile(`(?m)^[^#\n]*(?:encryption-provider-config=|--encryption-provider-config["']?\s*(?:#.*)?(?:,|\n\s*-)\s*)["']?([^\s"'\],]+)`)

// Find returns the path of kube-apiserver's EncryptionConfiguration on this machine below
// root, which is "/".
func Find(root string) (string, error) {
	for _, path := range commandLines {
		b, err := files.Read(filepath.Join(root, path), maxSize)
		if errors.Is(err, fs.ErrPermission) {
			return "", files.HintRoot(err)
		}
		if found := flagged.FindAllSubmatch(b, -1); err == nil && found != nil {
			last := found[len(found)-1] // which kube-apiserver takes if the flag is repeated
			return filepath.Join(root, string(last[1])), nil
		}
	}
	for _, path := range usual {
		path = filepath.Join(root, path)
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	return "", seal.Errorf("", "name it with --encryption-config, or its resources with --resources", "no EncryptionConfiguration is found where kubeadm, RKE2 and k3s name it")
}

// ResourcesIn returns the resources of the configuration in a file, or of this machine's if
// the path is empty.
func ResourcesIn(path string) ([]string, error) {
	if path == "" {
		var err error
		if path, err = Find("/"); err != nil {
			return nil, err
		}
	}
	e, err := Read(path)
	if err != nil {
		return nil, err
	}
	return e.All(), nil
}
