// Package kubeadm gives kube-apiserver kleidi's EncryptionConfiguration and socket on a
// node where kubeadm runs kube-apiserver: as a static pod whose manifest kubeadm writes.
//
// One list of operations is both the patch that kubeadm applies whenever it writes the
// manifest (kubeadm --patches), and the change to the manifest of a running node. It is a
// JSON patch, because a merge would replace the whole command line of kube-apiserver.
package kubeadm

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/beezy-dev/kleidi/seal"
)

// PatchName is the file name by which kubeadm recognises the target and the kind of the
// patch.
const PatchName = "kube-apiserver-kleidi+json.yaml"

// Manifest is the path to which kubeadm writes kube-apiserver's pod.
const Manifest = "/etc/kubernetes/manifests/kube-apiserver.yaml"

const flagName = "--encryption-provider-config"

// Operation is an operation of a JSON patch (RFC 6902) that appends a value to a list.
type Operation struct {
	Op    string `json:"op" yaml:"op"`
	Path  string `json:"path" yaml:"path"`
	Value any    `json:"value" yaml:"value"`
}

// Patch holds kleidi's settings for kube-apiserver.
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

// The lists of the manifest, as paths of a JSON patch that append to them.
const (
	commandEnd = "/spec/containers/0/command/-"
	argsEnd    = "/spec/containers/0/args/-"
	mountsEnd  = "/spec/containers/0/volumeMounts/-"
	volumesEnd = "/spec/volumes/-"
)

// kubeadmFolder holds the credentials that kubeadm writes. kubeadm mounts its folder pki into
// every kube-apiserver.
const (
	kubeadmFolder = "/etc/kubernetes"
	kubeadmPKI    = kubeadmFolder + "/pki"
)

// Operations returns the patch for the manifests that kubeadm will write. present is the
// manifest that it wrote last, or nil. kubeadm writes the mounts of other names again, so the
// patch leaves out the paths that they mount: a path that is mounted twice makes the pod
// invalid. It never leaves out the flag, of which kube-apiserver takes the last.
func (p Patch) Operations(present []byte) ([]Operation, error) {
	others, err := p.others(present)
	if err != nil {
		return nil, err
	}
	ops := []Operation{{"add", commandEnd, flagName + "=" + p.EncryptionConfig}}
	var volumes []Operation
	for _, v := range []struct {
		volume
		readOnly bool
	}{{p.configuration(), true}, {p.socket(), false}} {
		path := filepath.Clean(v.HostPath.Path)
		switch from, mounted := others[path]; {
		case !mounted:
			ops = append(ops, Operation{"add", mountsEnd, mount{v.Name, path, v.readOnly}})
			volumes = append(volumes, Operation{"add", volumesEnd, v.volume})
		case from != path:
			return nil, seal.Errorf("", "remove that mount from the ClusterConfiguration (apiServer.extraVolumes)",
				"kube-apiserver's %s is not the host's, which kleidi needs there", path)
		}
	}
	return append(ops, volumes...), nil
}

// others returns the host's path of each mount that kubeadm makes without kleidi's patch.
func (p Patch) others(present []byte) (map[string]string, error) {
	if present == nil {
		return map[string]string{kubeadmPKI: kubeadmPKI}, nil
	}
	others := map[string]string{}
	_, err := edited(present, func(pod *lists) error {
		for _, m := range pod.mounts.Content {
			if name := text(m, "name"); name != p.configuration().Name && name != p.socket().Name {
				others[filepath.Clean(text(m, "mountPath"))] = filepath.Clean(pod.hostPath(name))
			}
		}
		return p.sameFile(given(pod.commandLine()))
	})
	return others, err
}

// configuration is the path to mount: the folder of the EncryptionConfiguration, because a
// mounted file keeps its old content when a new file replaces it, so kube-apiserver's
// automatic reload would never see the change. In a folder with kubeadm's credentials, only
// the file is mounted.
func (p Patch) configuration() volume {
	folder := filepath.Dir(p.EncryptionConfig)
	if below, err := filepath.Rel(folder, kubeadmFolder); err == nil && filepath.IsLocal(below) {
		return p.configurationFile()
	}
	return volume{"kleidi-encryption", hostPath{folder, "Directory"}}
}

// configurationFile is the EncryptionConfiguration alone, which former versions of kleidi
// mounted from every folder.
func (p Patch) configurationFile() volume {
	return volume{"kleidi-encryption", hostPath{p.EncryptionConfig, "File"}}
}

// socket is the folder of the socket, because kleidi makes a new socket at each start.
func (p Patch) socket() volume {
	return volume{"kleidi", hostPath{filepath.Dir(p.Socket), "Directory"}}
}

// YAML returns the operations as a file for kubeadm --patches.
func YAML(patch []Operation) ([]byte, error) { return encode(patch) }

// Apply returns the manifest with the patch. Operations that are already done are left out,
// so that a second Apply changes nothing. A volume of a former version of kleidi, which has
// the same name, is replaced.
func (p Patch) Apply(manifest []byte) ([]byte, error) {
	return p.change(manifest, p.configuration())
}

// Applied reports whether the manifest has everything that kube-apiserver needs. The
// file alone counts as well as its folder.
func (p Patch) Applied(manifest []byte) (bool, error) {
	for _, v := range []volume{p.configuration(), p.configurationFile()} {
		after, err := p.change(manifest, v)
		if err != nil || bytes.Equal(after, manifest) {
			return err == nil, err
		}
	}
	return false, nil
}

func (p Patch) change(manifest []byte, configuration volume) ([]byte, error) {
	return edited(manifest, func(pod *lists) error {
		file := given(pod.commandLine())
		err := p.sameFile(file)
		if file == "" {
			err = put(pod.words[len(pod.words)-1], flagName+"="+p.EncryptionConfig, func(*yaml.Node) bool { return false })
		}
		return errors.Join(err, pod.mount(configuration, mount{ReadOnly: true}), pod.mount(p.socket(), mount{}))
	})
}

// sameFile refuses a kube-apiserver that has another EncryptionConfiguration.
func (p Patch) sameFile(given string) error {
	if given == "" || given == p.EncryptionConfig {
		return nil
	}
	return seal.Errorf("", "put kleidi's provider before the others in that file, or give that file's path with --encryption-config",
		"kube-apiserver already has %s=%s", flagName, given)
}

// Revert returns the manifest without the patch, whichever tool applied it.
func (p Patch) Revert(manifest []byte) ([]byte, error) {
	return edited(manifest, func(pod *lists) error {
		var gone []*yaml.Node
		line := pod.commandLine()
		for i, word := range line {
			if word.Value == flagName+"="+p.EncryptionConfig {
				gone = append(gone, word)
			} else if word.Value == flagName && i+1 < len(line) && line[i+1].Value == p.EncryptionConfig {
				gone = append(gone, word, line[i+1])
			}
		}
		for _, list := range pod.words {
			remove(list, func(n *yaml.Node) bool { return slices.Contains(gone, n) })
		}
		pod.unmount(p.configuration())
		pod.unmount(p.socket())
		return nil
	})
}

// RevertSocket returns the manifest without the socket. kube-apiserver keeps its
// EncryptionConfiguration.
func (p Patch) RevertSocket(manifest []byte) ([]byte, error) {
	return edited(manifest, func(pod *lists) error {
		pod.unmount(p.socket())
		return nil
	})
}

// lists are the lists of kube-apiserver's pod that the patch changes.
type lists struct {
	// words are the lists of the command line: command, args or both.
	words           []*yaml.Node
	mounts, volumes *yaml.Node
}

// commandLine returns the words of kube-apiserver's command line: Kubernetes puts those of
// args behind those of command.
func (l *lists) commandLine() (line []*yaml.Node) {
	for _, list := range l.words {
		line = append(line, list.Content...)
	}
	return line
}

// edited returns the manifest with changed lists, or its own bytes if nothing was changed.
func edited(manifest []byte, edit func(*lists) error) ([]byte, error) {
	var document yaml.Node
	if err := yaml.Unmarshal(manifest, &document); err != nil {
		return nil, err
	}
	var pod lists
	var err error
	if pod.words, err = wordLists(&document); err != nil {
		return nil, err
	}
	for _, needed := range []struct {
		list **yaml.Node
		path string
	}{{&pod.mounts, mountsEnd}, {&pod.volumes, volumesEnd}} {
		if *needed.list, err = at(&document, needed.path); err != nil {
			return nil, err
		}
	}
	if err := edit(&pod); err != nil {
		return nil, err
	}
	return encodeIfChanged(manifest, &document)
}

// wordLists returns the lists of the command line, in their order.
func wordLists(document *yaml.Node) (all []*yaml.Node, err error) {
	command, err := at(document, commandEnd)
	args, argsErr := at(document, argsEnd)
	if err != nil && argsErr != nil {
		return nil, err
	}
	for _, list := range []*yaml.Node{command, args} {
		if list != nil && list.Kind == yaml.SequenceNode {
			all = append(all, list)
		}
	}
	if all == nil {
		return nil, fmt.Errorf("the manifest's %s is not a list", commandEnd)
	}
	return all, nil
}

// mount gives the container a folder or a file of the host at the same path, unless the pod
// has that already, under any name. as says how; mount fills in the name and the path.
func (l *lists) mount(v volume, as mount) error {
	path := filepath.Clean(v.HostPath.Path)
	as.Name, as.MountPath = v.Name, path
	there := func(n *yaml.Node) bool { return filepath.Clean(text(n, "mountPath")) == path }
	if i := slices.IndexFunc(l.mounts.Content, there); i >= 0 && filepath.Clean(l.hostPath(text(l.mounts.Content[i], "name"))) == path {
		return nil
	}
	named := func(n *yaml.Node) bool { return text(n, "name") == v.Name }
	return errors.Join(
		put(l.mounts, as, func(n *yaml.Node) bool { return named(n) || there(n) }),
		put(l.volumes, v, named))
}

// hostPath returns the host's path of a volume, or nothing.
func (l *lists) hostPath(name string) string {
	for _, n := range l.volumes.Content {
		if h := field(n, "hostPath"); h != nil && text(n, "name") == name {
			return text(h, "path")
		}
	}
	return ""
}

func (l *lists) unmount(v volume) {
	named := func(n *yaml.Node) bool { return text(n, "name") == v.Name }
	remove(l.mounts, named)
	remove(l.volumes, named)
}

// put puts an entry into a list, instead of those that are in its place.
func put(list *yaml.Node, entry any, inPlace func(*yaml.Node) bool) error {
	var n yaml.Node
	if err := n.Encode(entry); err != nil {
		return err
	}
	i := slices.IndexFunc(list.Content, inPlace)
	if i < 0 {
		i = len(list.Content)
	}
	remove(list, inPlace)
	list.Content = slices.Insert(list.Content, i, &n)
	return nil
}

func remove(list *yaml.Node, unwanted func(*yaml.Node) bool) {
	list.Content = slices.DeleteFunc(list.Content, unwanted)
}

// given returns the file that a command line of kube-apiserver names, after the flag or in
// the next word. The last one counts.
func given(line []*yaml.Node) (file string) {
	for i, word := range line {
		if value, ok := strings.CutPrefix(word.Value, flagName+"="); ok {
			file = value
		} else if word.Value == flagName && i+1 < len(line) {
			file = line[i+1].Value
		}
	}
	return file
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

// text returns the text of a field, or nothing.
func text(n *yaml.Node, name string) string {
	if f := field(n, name); f != nil {
		return f.Value
	}
	return ""
}

// encodeIfChanged returns the manifest's own bytes if nothing was changed.
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
