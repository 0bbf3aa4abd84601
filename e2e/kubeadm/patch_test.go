package kubeadm

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/beezy-dev/kleidi/e2e/cluster"
	"github.com/beezy-dev/kleidi/e2e/node"
)

// flags give the answers that kubeadm would otherwise get from the network.
var flags = []string{"--kubernetes-version=v1.37.1", "--apiserver-advertise-address=192.0.2.1"}

// config gives the same answers as a file. kubeadm refuses --patches beside a file, so
// the file names the folder, as in docs/operations.md.
const config = `apiVersion: kubeadm.k8s.io/v1beta4
kind: InitConfiguration
localAPIEndpoint: {advertiseAddress: 192.0.2.1}
patches: {directory: /etc/kubernetes/patches}
---
apiVersion: kubeadm.k8s.io/v1beta4
kind: ClusterConfiguration
kubernetesVersion: v1.37.1
`

// Files of the host, as README names them.
const (
	manifest         = "/etc/kubernetes/manifests/kube-apiserver.yaml"
	encryptionConfig = "/etc/kubernetes/kleidi-encryption.yaml"
)

// host is a root folder with both programs.
type host struct {
	t    *testing.T
	root string
}

func newHost(t *testing.T) *host {
	t.Helper()
	built, err := cluster.Built("kubeadm-1.37")
	if err != nil {
		t.Fatal(err)
	}
	h := &host{t, t.TempDir()}
	for name, from := range map[string]string{"kubeadm": built["kubeadm-1.37"], "kleidi": node.Binary(t)} {
		if out, err := exec.Command("cp", from, filepath.Join(h.root, name)).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	for _, folder := range []string{"etc/kubernetes", "run/kleidi", "tmp"} {
		if err := os.MkdirAll(filepath.Join(h.root, folder), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	h.write("/kubeadm.yaml", config)
	return h
}

func (h *host) try(name string, args ...string) (string, error) {
	cmd := exec.Command("/"+name, args...)
	cmd.Dir, cmd.Env = "/", []string{"HOME=/"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: h.root}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// run runs a program in the root folder. It must succeed.
func (h *host) run(name string, args ...string) {
	h.t.Helper()
	if out, err := h.try(name, args...); err != nil {
		h.t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
}

// apiserver makes kubeadm write the manifest.
func (h *host) apiserver(args ...string) {
	h.t.Helper()
	h.run("kubeadm", append([]string{"init", "phase", "control-plane", "apiserver"}, args...)...)
}

func (h *host) write(file, content string) {
	h.t.Helper()
	if err := os.WriteFile(filepath.Join(h.root, file), []byte(content), 0o600); err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) read(file string) string {
	h.t.Helper()
	b, err := os.ReadFile(filepath.Join(h.root, file))
	if err != nil {
		h.t.Fatal(err)
	}
	return string(b)
}

// pod is the relevant part of the manifest, with the volumes by name, because kubeadm
// sorts them.
type pod struct {
	Command []string
	Mounts  map[string]any
	Volumes map[string]any
}

func (h *host) pod() pod {
	h.t.Helper()
	var m struct {
		Spec struct {
			Containers []struct {
				Command      []string
				VolumeMounts []map[string]any `yaml:"volumeMounts"`
			}
			Volumes []map[string]any
		}
	}
	if err := yaml.Unmarshal([]byte(h.read(manifest)), &m); err != nil || len(m.Spec.Containers) != 1 {
		h.t.Fatalf("%v\n%s", err, h.read(manifest))
	}
	c := m.Spec.Containers[0]
	return pod{c.Command, byName(c.VolumeMounts), byName(m.Spec.Volumes)}
}

// mountedOnce: the API refuses a pod that mounts a path twice.
func (h *host) mountedOnce(path string) {
	h.t.Helper()
	if n := strings.Count(h.read(manifest), "mountPath: "+path+"\n"); n != 1 {
		h.t.Errorf("kube-apiserver's pod mounts %s %d times:\n%s", path, n, h.read(manifest))
	}
}

func byName(list []map[string]any) map[string]any {
	named := map[string]any{}
	for _, entry := range list {
		named[entry["name"].(string)] = entry
	}
	return named
}

// TestPatch: kubeadm accepts the patch. Its manifest equals the one that kleidi makes
// from kubeadm's manifest without the patch. From there a way leads back.
func TestPatch(t *testing.T) {
	h := newHost(t)
	h.run("kleidi", "encryption-config", "--file", encryptionConfig)

	h.apiserver(flags...)
	plain, plainText := h.pod(), h.read(manifest)
	h.run("kleidi", "kubeadm", "patch", "--apply", "--wait=false")
	applied := h.pod()

	h.run("kleidi", "kubeadm", "patch", "--dir", "/etc/kubernetes/patches")
	h.apiserver(append(flags, "--patches=/etc/kubernetes/patches")...)
	patched := h.pod()
	h.apiserver("--config=/kubeadm.yaml")
	if got := h.pod(); !reflect.DeepEqual(got, patched) {
		t.Errorf("from a file kubeadm makes\n%v\nnot\n%v", got, patched)
	}
	if !reflect.DeepEqual(applied, patched) {
		t.Errorf("kleidi makes\n%v\nkubeadm\n%v", applied, patched)
	}
	if added := patched.Command[len(plain.Command):]; !reflect.DeepEqual(added, []string{"--encryption-provider-config=" + encryptionConfig}) {
		t.Errorf("kube-apiserver is also given %q", added)
	}
	if len(patched.Mounts) != len(plain.Mounts)+2 || len(patched.Volumes) != len(plain.Volumes)+2 {
		t.Errorf("volumes %v, mounts %v", patched.Volumes, patched.Mounts)
	}

	// A second application changes nothing, and kleidi reverts kubeadm's additions.
	text := h.read(manifest)
	h.run("kleidi", "kubeadm", "patch", "--apply", "--wait=false")
	if h.read(manifest) != text {
		t.Error("a manifest that kubeadm has patched is changed")
	}
	if out, err := h.try("kleidi", "kubeadm", "patch", "--revert"); err == nil || !strings.Contains(out, "move out first") {
		t.Errorf("reverted while Secrets are encrypted: %v %s", err, out)
	}
	h.run("kleidi", "kubeadm", "patch", "--revert", "--yes")
	if back := h.pod(); !reflect.DeepEqual(back, plain) {
		t.Errorf("the way back leads to\n%v\nnot\n%v\n%s", back, plain, plainText)
	}
}

// TestOwnFolder: kubeadm accepts the patch with the folder of the EncryptionConfiguration,
// and makes from it what kleidi makes of the manifest with the file alone, which former
// versions wrote.
func TestOwnFolder(t *testing.T) {
	const file, folder = "/etc/kubernetes/enc/encryption.yaml", "/etc/kubernetes/enc"
	h := newHost(t)
	h.run("kleidi", "encryption-config", "--file", file)
	h.run("kleidi", "kubeadm", "patch", "--dir", "/etc/kubernetes/patches", "--encryption-config", file)
	h.apiserver(append(flags, "--patches=/etc/kubernetes/patches")...)
	patched := h.pod()
	if m, v := fmt.Sprint(patched.Mounts["kleidi-encryption"]), fmt.Sprint(patched.Volumes["kleidi-encryption"]); !strings.Contains(m, "mountPath:"+folder+" ") || !strings.Contains(v, "path:"+folder+" type:Directory") {
		t.Errorf("mount %s, volume %s", m, v)
	}
	h.write(manifest, strings.NewReplacer("mountPath: "+folder+"\n", "mountPath: "+file+"\n", "path: "+folder+"\n      type: Directory", "path: "+file+"\n      type: File").Replace(h.read(manifest)))
	if former := h.pod(); reflect.DeepEqual(former, patched) {
		t.Fatal("the manifest does not mount the file alone")
	}
	h.run("kleidi", "kubeadm", "patch", "--apply", "--wait=false", "--encryption-config", file)
	if now := h.pod(); !reflect.DeepEqual(now, patched) {
		t.Errorf("kleidi makes\n%v\nkubeadm\n%v", now, patched)
	}
}

// TestClusterConfiguration: a ClusterConfiguration that names the file and mounts its folder,
// as a cluster with another provider has it, goes together with the patch. So does a file in
// the folder that kubeadm itself mounts.
func TestClusterConfiguration(t *testing.T) {
	const file, folder = "/etc/kubernetes/enc/encryption.yaml", "/etc/kubernetes/enc"
	h := newHost(t)
	h.run("kleidi", "encryption-config", "--file", file)
	h.write("/kubeadm.yaml", config+`apiServer:
  extraArgs: [{name: encryption-provider-config, value: `+file+`}]
  extraVolumes: [{name: enc, hostPath: `+folder+`, mountPath: `+folder+`, readOnly: true, pathType: DirectoryOrCreate}]
`)
	for _, patched := range []bool{false, true} {
		if err := os.MkdirAll(filepath.Join(h.root, "etc/kubernetes/patches"), 0o755); err != nil {
			t.Fatal(err)
		}
		h.apiserver("--config=/kubeadm.yaml")
		h.mountedOnce(folder)
		if patched {
			h.mountedOnce("/run/kleidi")
		}
		h.run("kleidi", "kubeadm", "patch", "--dir", "/etc/kubernetes/patches", "--encryption-config", file)
	}
	text := h.read(manifest)
	h.run("kleidi", "kubeadm", "patch", "--apply", "--wait=false", "--encryption-config", file)
	if h.read(manifest) != text {
		t.Error("the manifest that kubeadm has patched lacks something")
	}

	h = newHost(t)
	h.run("kleidi", "kubeadm", "patch", "--dir", "/etc/kubernetes/patches", "--encryption-config", "/etc/kubernetes/pki/encryption.yaml")
	h.apiserver(append(flags, "--patches=/etc/kubernetes/patches")...)
	h.mountedOnce("/etc/kubernetes/pki")
}
