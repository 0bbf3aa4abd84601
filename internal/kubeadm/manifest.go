package kubeadm

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/beezy-dev/kleidi/internal/encryptionconfig"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/seal"
)

// maxManifest bounds the files that are read, in bytes.
const maxManifest = 1 << 20

// ApplyFile changes a manifest on this node, after which kubelet restarts kube-apiserver. It
// reports whether anything had to change.
func (p Patch) ApplyFile(manifest string) (bool, error) {
	for _, needed := range []struct{ path, hint string }{
		{p.EncryptionConfig, "make it: kleidi encryption-config --file " + p.EncryptionConfig},
		{filepath.Dir(p.Socket), "start kleidi: systemctl start kleidi"},
	} {
		// kubelet would start no kube-apiserver at all
		if _, err := os.Stat(needed.path); err != nil {
			return false, seal.WithHint(err, needed.hint)
		}
	}
	return change(manifest, p.Apply)
}

// RevertFile takes the change back. It refuses while kube-apiserver writes Secrets that only
// kleidi can read, unless forced.
func (p Patch) RevertFile(manifest, provider string, force bool) (bool, error) {
	if !force {
		if err := p.unneeded(provider); err != nil {
			return false, err
		}
	}
	return change(manifest, p.Revert)
}

// unneeded returns nil if kube-apiserver writes nothing under kleidi any more.
func (p Patch) unneeded(provider string) error {
	b, err := files.Read(p.EncryptionConfig, maxManifest)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	e, err := encryptionconfig.Parse(b)
	if err != nil {
		return fmt.Errorf("%s: %w", p.EncryptionConfig, err)
	}
	if e.Encrypts(provider) {
		return seal.Errorf("", "put identity first in that file, restart kube-apiserver, and have all objects written again (kleidi migrate); then revert. With --yes, what is encrypted becomes unreadable",
			"%s still has kube-apiserver encrypt with kleidi", p.EncryptionConfig)
	}
	return nil
}

func change(manifest string, edit func([]byte) ([]byte, error)) (bool, error) {
	before, err := files.Read(manifest, maxManifest)
	if err != nil {
		return false, err
	}
	after, err := edit(before)
	if err != nil {
		return false, fmt.Errorf("%s: %w", manifest, err)
	}
	if bytes.Equal(before, after) {
		return false, nil
	}
	// kubelet runs every file of the folder whose name begins with no dot
	next := filepath.Join(filepath.Dir(manifest), "."+filepath.Base(manifest)+".kleidi")
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	if err := files.WriteNew(next, after); err != nil {
		return false, err
	}
	return true, errors.Join(os.Rename(next, manifest), files.SyncFolder(manifest))
}
