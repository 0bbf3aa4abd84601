// Package kubeadm gives kube-apiserver kleidi's EncryptionConfiguration and socket, where
// kubeadm runs kube-apiserver: as a static pod whose manifest kubeadm writes.
//
// One list of operations is both the patch that kubeadm applies whenever it writes the
// manifest (kubeadm --patches), and the change to the manifest of a running node. It is a
// JSON patch, because a merge would replace the whole command line of kube-apiserver.
package kubeadm

import (
	"bytes"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/beezy-dev/kleidi/seal"
)

// PatchName is a name by which kubeadm knows the target and the kind of a patch.
const PatchName = "kube-apiserver-kleidi+json.yaml"

// Manifest is where kubeadm writes kube-apiserver's pod.
const Manifest = "/etc/kubernetes/manifests/kube-apiserver.yaml"

const flagName = "--encryption-provider-config"

// Operation is one of a JSON patch (RFC 6902): it appends a value to a list.
type Operation struct {
	Op    string `json:"op" yaml:"op"`
	Path  string `json:"path" yaml:"path"`
	Value any    `json:"value" yaml:"value"`
}

// Patch is what kube-apiserver needs of kleidi.
type Patch struct {
	EncryptionConfig string // the file
	Socket           string
}

type mount struct {
	Name      string `json:"name" yaml:"name"`
	MountPath string `json:"mountPath" yaml:"mountPath"`
	ReadOnly  bool   `json:"readOnly,omitempty" yaml:"readOnly,omitempty"`
}

type volume struct {
	Name     string   `json:"name" yaml:"name"`
	HostPath hostPath `json:"hostPath" yaml:"hostPath"`
}

type hostPath struct {
	Path string `json:"path" yaml:"path"`
	Type string `json:"type" yaml:"type"`
}

// Operations returns the patch. It mounts the folder of the socket, since kleidi makes a new
// socket at each start.
func (p Patch) Operations() []Operation {
	folder := filepath.Dir(p.Socket)
	return []Operation{
		{"add", "/spec/containers/0/command/-", flagName + "=" + p.EncryptionConfig},
		{"add", "/spec/containers/0/volumeMounts/-", mount{"kleidi-encryption", p.EncryptionConfig, true}},
		{"add", "/spec/containers/0/volumeMounts/-", mount{"kleidi", folder, false}},
		{"add", "/spec/volumes/-", volume{"kleidi-encryption", hostPath{p.EncryptionConfig, "File"}}},
		{"add", "/spec/volumes/-", volume{"kleidi", hostPath{folder, "Directory"}}},
	}
}

// YAML returns the patch as a file for kubeadm --patches.
func (p Patch) YAML() ([]byte, error) { return encode(p.Operations()) }

// Apply returns the manifest with the patch. Operations that are already done are left out,
// so that a second Apply changes nothing.
func (p Patch) Apply(manifest []byte) ([]byte, error) {
	var document yaml.Node
	if err := yaml.Unmarshal(manifest, &document); err != nil {
		return nil, err
	}
	for i, o := range p.Operations() {
		list, err := at(&document, o.Path)
		if err != nil {
			return nil, err
		}
		if i == 0 {
			if other := given(list); other != "" && other != p.EncryptionConfig {
				return nil, seal.Errorf("", "put kleidi's provider before the others in that file, or give that file's path with --encryption-config",
					"kube-apiserver already has %s=%s", flagName, other)
			}
		}
		value, err := node(o.Value)
		if err != nil {
			return nil, err
		}
		if !slices.ContainsFunc(list.Content, func(n *yaml.Node) bool { return sameEntry(n, value) }) {
			list.Content = append(list.Content, value)
		}
	}
	return encodeIfChanged(manifest, &document)
}

// Revert returns the manifest without the patch, whoever applied it.
func (p Patch) Revert(manifest []byte) ([]byte, error) {
	var document yaml.Node
	if err := yaml.Unmarshal(manifest, &document); err != nil {
		return nil, err
	}
	for _, o := range p.Operations() {
		list, err := at(&document, o.Path)
		if err != nil {
			return nil, err
		}
		value, err := node(o.Value)
		if err != nil {
			return nil, err
		}
		list.Content = slices.DeleteFunc(list.Content, func(n *yaml.Node) bool { return sameEntry(n, value) })
	}
	return encodeIfChanged(manifest, &document)
}

// given returns the file that a command line of kube-apiserver names.
func given(command *yaml.Node) string {
	for _, word := range command.Content {
		if file, ok := strings.CutPrefix(word.Value, flagName+"="); ok {
			return file
		}
	}
	return ""
}

// at returns the list that a path with a trailing /- names.
func at(document *yaml.Node, path string) (*yaml.Node, error) {
	if len(document.Content) != 1 {
		return nil, fmt.Errorf("the manifest is empty")
	}
	n := document.Content[0]
	for _, word := range strings.Split(strings.TrimSuffix(path[1:], "/-"), "/") {
		next := field(n, word)
		if n.Kind == yaml.SequenceNode && word == "0" && len(n.Content) > 0 {
			next = n.Content[0]
		}
		if next == nil {
			return nil, fmt.Errorf("the manifest has no %s; kubeadm's manifest of kube-apiserver has", path)
		}
		n = next
	}
	return n, nil
}

func field(n *yaml.Node, name string) *yaml.Node {
	if n.Kind != yaml.MappingNode {
		return nil
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == name {
			return n.Content[i+1]
		}
	}
	return nil
}

// sameEntry reports whether two entries of a list are the same one: equal words, equal
// names, or the same place under another name.
func sameEntry(a, b *yaml.Node) bool {
	if a.Kind == yaml.ScalarNode || b.Kind == yaml.ScalarNode {
		return a.Kind == b.Kind && a.Value == b.Value
	}
	for _, key := range [][]string{{"name"}, {"mountPath"}, {"hostPath", "path"}} {
		x, y := a, b
		for _, word := range key {
			if x != nil && y != nil {
				x, y = field(x, word), field(y, word)
			}
		}
		if x != nil && y != nil && x.Value == y.Value {
			return true
		}
	}
	return false
}

func node(value any) (*yaml.Node, error) {
	var n yaml.Node
	err := n.Encode(value)
	return &n, err
}

// encodeIfChanged keeps the bytes of a manifest in which nothing was changed.
func encodeIfChanged(before []byte, document *yaml.Node) ([]byte, error) {
	after, err := encode(document)
	if err != nil {
		return nil, err
	}
	var same yaml.Node
	if err := yaml.Unmarshal(before, &same); err != nil {
		return nil, err
	}
	if plain, err := encode(&same); err != nil || bytes.Equal(plain, after) {
		return before, err
	}
	return after, nil
}

func encode(value any) ([]byte, error) {
	var b bytes.Buffer
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	if err := e.Encode(value); err != nil {
		return nil, err
	}
	return b.Bytes(), e.Close()
}
