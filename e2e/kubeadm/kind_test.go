package kubeadm

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// kindConfig is the relevant part of the configuration that kind 0.33 writes for a node
// image of Kubernetes 1.37.
const kindConfig = `apiVersion: kubeadm.k8s.io/v1beta4
kind: ClusterConfiguration
kubernetesVersion: v1.37.1
clusterName: kleidi
controlPlaneEndpoint: kleidi-control-plane:6443
apiServer:
  certSANs: [localhost, 127.0.0.1]
  extraArgs:
    - {name: runtime-config, value: ""}
`

// merge merges a patch as kind does: extraArgs by name, all other lists as a whole.
func merge(target, patch map[string]any) {
	for key, value := range patch {
		at, isMap := value.(map[string]any)
		into, _ := target[key].(map[string]any)
		args, _ := value.([]any)
		present, _ := target[key].([]any)
		switch {
		case isMap && into != nil:
			merge(into, at)
		case key == "extraArgs":
			for _, arg := range args {
				name := arg.(map[string]any)["name"]
				present = slices.DeleteFunc(present, func(e any) bool { return e.(map[string]any)["name"] == name })
				present = append(present, arg)
			}
			target[key] = present
		default:
			target[key] = value
		}
	}
}

func parse(t *testing.T, document string) map[string]any {
	t.Helper()
	m := map[string]any{}
	if err := yaml.Unmarshal([]byte(document), &m); err != nil {
		t.Fatal(err)
	}
	return m
}

// TestKindPatches: kubeadm takes the patches of each cluster in deploy/kind, and
// kube-apiserver gets the EncryptionConfiguration and the folder of the socket.
func TestKindPatches(t *testing.T) {
	clusters, err := filepath.Glob("../../deploy/kind/*/cluster.yaml")
	if err != nil || len(clusters) == 0 {
		t.Fatalf("clusters %v, error %v", clusters, err)
	}
	h := newHost(t)
	for _, cluster := range clusters {
		t.Run(filepath.Base(filepath.Dir(cluster)), func(t *testing.T) { kindPatches(t, h, cluster) })
	}
}

func kindPatches(t *testing.T, h *host, cluster string) {
	b, err := os.ReadFile(cluster)
	if err != nil {
		t.Fatal(err)
	}
	var kind struct {
		Nodes []struct {
			ExtraMounts []map[string]any `yaml:"extraMounts"`
		}
		Patches []string `yaml:"kubeadmConfigPatches"`
	}
	if err := yaml.Unmarshal(b, &kind); err != nil || len(kind.Patches) == 0 {
		t.Fatalf("%v, %d patches", err, len(kind.Patches))
	}
	target := parse(t, kindConfig)
	for _, text := range kind.Patches {
		patch := parse(t, text)
		// kind ignores a patch for another kind or version without a word
		if patch["kind"] != target["kind"] || patch["apiVersion"] != target["apiVersion"] {
			t.Fatalf("kind would not apply the patch of %v %v", patch["apiVersion"], patch["kind"])
		}
		merge(target, patch)
	}
	merged, err := yaml.Marshal(target)
	if err != nil {
		t.Fatal(err)
	}
	h.write("/kind.yaml", string(merged)+`---
apiVersion: kubeadm.k8s.io/v1beta4
kind: InitConfiguration
localAPIEndpoint: {advertiseAddress: 192.0.2.1}
`)
	if out, err := h.try("kubeadm", "config", "validate", "--config=/kind.yaml"); err != nil || strings.Contains(out, "unknown field") {
		t.Fatalf("%v\n%s", err, out)
	}
	h.apiserver("--config=/kind.yaml")
	got := h.pod()
	for _, flag := range []string{"--encryption-provider-config=" + encryptionConfig, "--runtime-config="} {
		if !slices.Contains(got.Command, flag) {
			t.Errorf("kube-apiserver lacks %s: %q", flag, got.Command)
		}
	}
	for name, path := range map[string]string{"kleidi-encryption": encryptionConfig, "kleidi": "/run/kleidi"} {
		mount, _ := got.Mounts[name].(map[string]any)
		volume, _ := got.Volumes[name].(map[string]any)
		host, _ := volume["hostPath"].(map[string]any)
		if mount["mountPath"] != path || host["path"] != path {
			t.Errorf("volume %s: %v, mounted as %v", name, volume, mount)
		}
	}
	if !slices.ContainsFunc(kind.Nodes[0].ExtraMounts, func(m map[string]any) bool { return m["containerPath"] == encryptionConfig }) {
		t.Errorf("the node has no %s", encryptionConfig)
	}
}
