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

// OperationsFor returns the patch for kubeadm on this node. The manifest need not exist yet.
func (p Patch) OperationsFor(manifest string) ([]Operation, error) {
	present, err := files.Read(manifest, maxManifest)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	patch, err := p.Operations(present)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", manifest, err)
	}
	return patch, nil
}

// ApplyFile changes a manifest on this node, after which kubelet restarts kube-apiserver.
// It reports whether the manifest changed.
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
	changed, err := change(manifest, p.Apply)
	if errors.Is(err, fs.ErrNotExist) {
		err = seal.WithHint(err, "before kubeadm init or join, write the patch for it: kleidi kubeadm patch --dir /etc/kubernetes/patches; name another manifest with --manifest")
	}
	return changed, err
}

// RevertFile undoes the change. It refuses while the EncryptionConfiguration names kleidi,
// unless forced. If other providers encrypt, kube-apiserver keeps the EncryptionConfiguration,
// and only the socket goes: it could not read what they encrypted without the file. RevertFile
// reports whether that is so.
func (p Patch) RevertFile(manifest string, force bool) (changed, kept bool, err error) {
	e, err := p.read()
	if err == nil && e != nil {
		kept = e.EncryptsWithout(p.endpoint()) && !e.Names(p.endpoint())
		if !force {
			err = p.unneeded(e)
		}
	}
	if err != nil && !force {
		return false, false, err
	}
	revert := p.Revert
	if kept {
		revert = p.RevertSocket
	}
	changed, err = change(manifest, revert)
	if errors.Is(err, fs.ErrNotExist) {
		err = seal.WithHint(err, "name the manifest with --manifest; where there is none, there is nothing to take back")
	}
	return changed, kept, err
}

func (p Patch) endpoint() string { return "unix://" + p.Socket }

// read returns the EncryptionConfiguration, or nil if there is none.
func (p Patch) read() (*encryptionconfig.EncryptionConfiguration, error) {
	e, err := encryptionconfig.Read(p.EncryptionConfig)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return e, err
}

// unneeded returns nil if the EncryptionConfiguration does not name kleidi.
func (p Patch) unneeded(e *encryptionconfig.EncryptionConfiguration) error {
	switch {
	case e.Writes(p.endpoint()):
		return seal.Errorf("", "move out first: the steps are in kleidi encryption-config --from "+seal.Quote(p.EncryptionConfig)+" --to=identity; then revert. With --yes, the encrypted objects become unreadable",
			"%s still makes kube-apiserver encrypt with kleidi", p.EncryptionConfig)
	case e.Names(p.endpoint()):
		to := "identity"
		if e.EncryptsWithout(p.endpoint()) {
			to = "PROVIDER"
		}
		return seal.Errorf("", "end the move first: kleidi migrate, kleidi usage, and step 3 of kleidi encryption-config --from "+seal.Quote(p.EncryptionConfig)+" --to="+to+"; then revert. With --yes, the objects that are still encrypted become unreadable",
			"%s still makes kube-apiserver read with kleidi", p.EncryptionConfig)
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
	// kubelet runs every file of the folder whose name does not begin with a dot
	next := filepath.Join(filepath.Dir(manifest), "."+filepath.Base(manifest)+".kleidi")
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	if err := files.WriteNew(next, after); err != nil {
		return false, err
	}
	return true, errors.Join(os.Rename(next, manifest), files.SyncFolder(manifest))
}
