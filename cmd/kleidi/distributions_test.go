package main

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/encryptionconfig"
)

// apiserverFile is the EncryptionConfiguration that docs/distributions.md has written.
const apiserverFile = "/etc/kubernetes/kleidi-encryption.yaml"

// rancherConfig has the keys of RKE2's and k3s's config.yaml that deploy/ uses.
type rancherConfig struct {
	Args        []string `yaml:"kube-apiserver-arg+"`
	ExtraMounts []string `yaml:"kube-apiserver-extra-mount+"`
	ClusterInit bool     `yaml:"cluster-init"`
	Server      string   `yaml:"server"`
	Token       string   `yaml:"token"`
}

// parseDocuments parses each YAML document of a file, and refuses unknown keys.
func parseDocuments[T any](t *testing.T, file string) (all []T) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	d := yaml.NewDecoder(bytes.NewReader(b))
	d.KnownFields(true)
	for {
		var one T
		err := d.Decode(&one)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		all = append(all, one)
	}
}

func rancherFile(t *testing.T, file string) rancherConfig {
	t.Helper()
	all := parseDocuments[rancherConfig](t, file)
	if len(all) != 1 {
		t.Fatalf("%s has %d documents", file, len(all))
	}
	return all[0]
}

func TestRKE2MountsTheSocketsFolderAndTheFileOnce(t *testing.T) {
	c := rancherFile(t, "../../deploy/rke2/kleidi.yaml")
	if want := []string{"encryption-provider-config=" + apiserverFile}; !slices.Equal(c.Args, want) {
		t.Errorf("kube-apiserver-arg is %q, not %q", c.Args, want)
	}
	folder := filepath.Dir(strings.TrimPrefix(config.Default().KMS.Socket, "unix:"))
	var mounted []string
	for _, m := range c.ExtraMounts {
		source, target, ok := strings.Cut(m, ":")
		if !ok || source != target {
			t.Errorf("%q does not mount a path at the same path", m)
		}
		mounted = append(mounted, target)
	}
	// RKE2 itself mounts the file of each argument, and Kubernetes refuses a pod that
	// mounts two volumes at one path.
	if !slices.Equal(mounted, []string{folder}) {
		t.Errorf("kube-apiserver-extra-mount has %q, not only %s", mounted, folder)
	}
}

func TestK3sMountsNothing(t *testing.T) {
	c := rancherFile(t, "../../deploy/k3s/kleidi.yaml")
	if want := []string{"encryption-provider-config=" + apiserverFile}; !slices.Equal(c.Args, want) {
		t.Errorf("kube-apiserver-arg is %q, not %q", c.Args, want)
	}
	if len(c.ExtraMounts) > 0 {
		t.Errorf("k3s has no kube-apiserver-extra-mount, and ends on %q", c.ExtraMounts)
	}
	if !rancherFile(t, "../../deploy/k3s/first.yaml").ClusterInit {
		t.Error("the first of three servers does not start etcd")
	}
}

// rancherCluster is what deploy/ sets of a Cluster of provisioning.cattle.io.
type rancherCluster struct {
	APIVersion string            `yaml:"apiVersion"`
	Kind       string            `yaml:"kind"`
	Metadata   map[string]string `yaml:"metadata"`
	Spec       struct {
		RKEConfig struct {
			// Rancher drops a key with a plus sign.
			MachineGlobalConfig struct {
				Args        []string `yaml:"kube-apiserver-arg"`
				ExtraMounts []string `yaml:"kube-apiserver-extra-mount"`
			} `yaml:"machineGlobalConfig"`
		} `yaml:"rkeConfig"`
	} `yaml:"spec"`
}

func TestRancherSetsWhatRKE2Sets(t *testing.T) {
	want := rancherFile(t, "../../deploy/rke2/kleidi.yaml")
	all := parseDocuments[rancherCluster](t, "../../deploy/rancher/cluster.yaml")
	if len(all) != 1 {
		t.Fatalf("%d documents", len(all))
	}
	got := all[0].Spec.RKEConfig.MachineGlobalConfig
	if !slices.Equal(got.Args, want.Args) || !slices.Equal(got.ExtraMounts, want.ExtraMounts) {
		t.Errorf("%+v, not %+v", got, want)
	}
}

// talosDocument has the keys that deploy/talos uses, of v1alpha1's configuration and of the
// documents KubeStaticPodConfig and KubeEtcdEncryptionConfig.
type talosDocument struct {
	APIVersion string `yaml:"apiVersion"`
	Kind       string `yaml:"kind"`
	Name       string `yaml:"name"`
	Machine    struct {
		Files []struct {
			Path        string `yaml:"path"`
			Permissions string `yaml:"permissions"`
			Op          string `yaml:"op"`
			Content     string `yaml:"content"`
		} `yaml:"files"`
	} `yaml:"machine"`
	Cluster struct {
		Secretbox map[string]string `yaml:"secretboxEncryptionSecret"`
		APIServer struct {
			ExtraVolumes []struct {
				HostPath  string `yaml:"hostPath"`
				MountPath string `yaml:"mountPath"`
			} `yaml:"extraVolumes"`
		} `yaml:"apiServer"`
	} `yaml:"cluster"`
	Pod    yaml.Node      `yaml:"pod"`
	Config map[string]any `yaml:"config"`
}

func TestTalosConfiguresKleidiForItsUser(t *testing.T) {
	all := parseDocuments[talosDocument](t, "../../deploy/talos/kleidi.yaml")
	if len(all) != 2 || all[1].Kind != "KubeStaticPodConfig" {
		t.Fatalf("%+v", all)
	}
	files := all[0].Machine.Files
	if len(files) != 1 {
		t.Fatalf("%d files", len(files))
	}
	file := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(file, []byte(files[0].Content), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := config.Load(file)
	if err != nil {
		t.Fatal(err)
	}
	if c.KMS.SocketUID != 65534 || !slices.Contains(c.KMS.AllowedUIDs, 65534) {
		t.Errorf("kube-apiserver may not call: %+v", c.KMS)
	}
	var pod struct {
		Spec struct {
			Containers []struct {
				Args   []string `yaml:"args"`
				Mounts []struct {
					Name string `yaml:"name"`
					Path string `yaml:"mountPath"`
				} `yaml:"volumeMounts"`
			} `yaml:"containers"`
			Volumes []struct {
				Name string `yaml:"name"`
			} `yaml:"volumes"`
		} `yaml:"spec"`
	}
	if err := all[1].Pod.Decode(&pod); err != nil || len(pod.Spec.Containers) != 1 {
		t.Fatalf("%+v, %v", pod, err)
	}
	if want := []string{"serve", "--config", files[0].Path}; !slices.Equal(pod.Spec.Containers[0].Args, want) {
		t.Errorf("the pod runs %q, not %q", pod.Spec.Containers[0].Args, want)
	}
	paths, named := map[string]bool{}, map[string]bool{}
	for _, v := range pod.Spec.Volumes {
		named[v.Name] = true
	}
	for _, m := range pod.Spec.Containers[0].Mounts {
		paths[m.Path] = true
		if !named[m.Name] {
			t.Errorf("the pod has no volume %s", m.Name)
		}
	}
	folder := filepath.Dir(strings.TrimPrefix(c.KMS.Socket, "unix:"))
	for _, path := range []string{c.TPM.Device, c.State.Dir, folder, "/sys/kernel/security"} {
		if !paths[path] {
			t.Errorf("the pod does not mount %s", path)
		}
	}
	if v := all[0].Cluster.APIServer.ExtraVolumes; len(v) != 1 || v[0].HostPath != folder || v[0].MountPath != folder {
		t.Errorf("kube-apiserver mounts %+v, not %s", v, folder)
	}
}

func TestTalosReadsWithKleidi(t *testing.T) {
	all := parseDocuments[talosDocument](t, "../../deploy/talos/encryption.yaml")
	if len(all) != 2 || all[0].Cluster.Secretbox["$patch"] != "delete" || all[1].Kind != "KubeEtcdEncryptionConfig" {
		t.Fatalf("%+v", all)
	}
	all[1].Config["apiVersion"], all[1].Config["kind"] = "apiserver.config.k8s.io/v1", "EncryptionConfiguration"
	b, err := yaml.Marshal(all[1].Config)
	if err != nil {
		t.Fatal(err)
	}
	e, err := encryptionconfig.Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	var kinds []string
	for _, p := range e.Resources[0].Providers {
		kinds = append(kinds, p.Kind())
	}
	if want := []string{"secretbox", "kms", "identity"}; !slices.Equal(kinds, want) {
		t.Errorf("the providers are %q, not %q", kinds, want)
	}
	own := encryptionconfig.New("kleidi", config.Default().KMS.Socket, []string{"secrets"})
	if got, want := e.Resources[0].Providers[1].KMS, own.Resources[0].Providers[0].KMS; *got != *want {
		t.Errorf("kms is %+v, and kleidi writes %+v", got, want)
	}
}

func TestJoinFilesNameAServerAndItsPort(t *testing.T) {
	for file, port := range map[string]string{"../../deploy/rke2/join.yaml": ":9345", "../../deploy/k3s/join.yaml": ":6443"} {
		c := rancherFile(t, file)
		if !strings.HasPrefix(c.Server, "https://") || !strings.HasSuffix(c.Server, port) || c.Token != "TOKEN" {
			t.Errorf("%s: %+v", file, c)
		}
	}
}

func TestDistributionsStartKleidiFirst(t *testing.T) {
	before := sectionOf(t, unitFile, "Unit")["Before"]
	for file, service := range map[string]string{
		"../../deploy/rke2/kleidi.conf": "rke2-server.service",
		"../../deploy/k3s/kleidi.conf":  "k3s.service",
	} {
		for _, setting := range []string{"Wants", "After"} {
			if got := sectionOf(t, file, "Unit")[setting]; !slices.Equal(got, []string{"kleidi.service"}) {
				t.Errorf("%s: %s= is %q", file, setting, got)
			}
		}
		if !slices.Contains(strings.Fields(strings.Join(before, " ")), service) {
			t.Errorf("%s is not ordered before %s", unitFile, service)
		}
	}
}
