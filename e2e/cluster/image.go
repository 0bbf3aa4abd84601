package cluster

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path"
)

// Image is a container image from scratch, which holds one static program. It comes from
// no registry.
type Image struct {
	// Reference is its name with its tag.
	Reference string
	// Binary is the program, a file of this machine.
	Binary string
	// Path is the program's place in the image.
	Path string
	// Entrypoint is started unless a pod names a command.
	Entrypoint []string
}

// Write writes the image as `docker save` does, which `ctr images import` reads.
func (i Image) Write(w io.Writer) error {
	digest := sha256.New()
	size := &counter{}
	if err := i.layer(io.MultiWriter(digest, size)); err != nil {
		return err
	}
	config, err := json.Marshal(map[string]any{
		"architecture": "amd64", "os": "linux",
		// kubeadm's manifests name their programs without a folder
		"config": map[string]any{"Entrypoint": i.Entrypoint, "Env": []string{"PATH=/usr/local/bin"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + hex.EncodeToString(digest.Sum(nil))}},
	})
	if err != nil {
		return err
	}
	manifest, err := json.Marshal([]any{map[string]any{"Config": "config.json", "RepoTags": []string{i.Reference}, "Layers": []string{"layer.tar"}}})
	if err != nil {
		return err
	}
	archive := tar.NewWriter(w)
	for name, content := range map[string][]byte{"config.json": config, "manifest.json": manifest} {
		if err := archive.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(content))}); err != nil {
			return err
		}
		if _, err := archive.Write(content); err != nil {
			return err
		}
	}
	if err := archive.WriteHeader(&tar.Header{Name: "layer.tar", Mode: 0o644, Size: size.n}); err != nil {
		return err
	}
	if err := i.layer(archive); err != nil {
		return err
	}
	return archive.Close()
}

// layer writes the file system.
func (i Image) layer(w io.Writer) error {
	f, err := os.Open(i.Binary)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	layer := tar.NewWriter(w)
	if err := layer.WriteHeader(&tar.Header{Name: path.Clean(i.Path)[1:], Mode: 0o755, Size: info.Size()}); err != nil {
		return err
	}
	if _, err := io.Copy(layer, f); err != nil {
		return fmt.Errorf("%s: %w", i.Binary, err)
	}
	return layer.Close()
}

type counter struct{ n int64 }

func (c *counter) Write(b []byte) (int, error) {
	c.n += int64(len(b))
	return len(b), nil
}
