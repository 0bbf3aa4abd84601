package kubeadm

import (
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// manifest is what kubeadm 1.37 writes, shortened.
const manifest = `apiVersion: v1
kind: Pod
metadata:
  annotations:
    kubeadm.kubernetes.io/kube-apiserver.advertise-address.endpoint: 10.99.0.1:6443
  name: kube-apiserver
  namespace: kube-system
spec:
  containers:
  - command:
    - kube-apiserver
    - --advertise-address=10.99.0.1
    image: registry.k8s.io/kube-apiserver:v1.37.1
    name: kube-apiserver
    volumeMounts:
    - mountPath: /etc/kubernetes/pki
      name: k8s-certs
      readOnly: true
  hostNetwork: true
  volumes:
  - hostPath:
      path: /etc/kubernetes/pki
      type: DirectoryOrCreate
    name: k8s-certs
status: {}
`

var patch = Patch{EncryptionConfig: "/etc/kubernetes/kleidi-encryption.yaml", Socket: "/run/kleidi/kms.sock"}

func TestApply(t *testing.T) {
	got, err := patch.Apply([]byte(manifest))
	if err != nil {
		t.Fatal(err)
	}
	var pod struct {
		Spec struct {
			Containers []struct {
				Command      []string
				VolumeMounts []mount `yaml:"volumeMounts"`
			}
			Volumes []volume
		}
	}
	if err := yaml.Unmarshal(got, &pod); err != nil {
		t.Fatal(err)
	}
	c := pod.Spec.Containers[0]
	if len(c.Command) != 3 || c.Command[2] != "--encryption-provider-config=/etc/kubernetes/kleidi-encryption.yaml" {
		t.Errorf("command %q", c.Command)
	}
	if len(c.VolumeMounts) != 3 || c.VolumeMounts[2] != (mount{"kleidi", "/run/kleidi", false}) || c.VolumeMounts[1] != (mount{"kleidi-encryption", patch.EncryptionConfig, true}) {
		t.Errorf("mounts %+v", c.VolumeMounts)
	}
	if v := pod.Spec.Volumes; len(v) != 3 || v[2] != (volume{"kleidi", hostPath{"/run/kleidi", "Directory"}}) || v[1].HostPath.Type != "File" {
		t.Errorf("volumes %+v", v)
	}
	again, err := patch.Apply(got)
	if err != nil || string(again) != string(got) {
		t.Errorf("a second time: %v\n%s", err, again)
	}
	back, err := patch.Revert(got)
	if err != nil {
		t.Fatal(err)
	}
	if plain, err := patch.Revert([]byte(manifest)); err != nil || string(plain) != manifest {
		t.Errorf("a manifest without the patch is changed: %v\n%s", err, plain)
	}
	var a, b any
	if yaml.Unmarshal(back, &a) != nil || yaml.Unmarshal([]byte(manifest), &b) != nil || string(mustEncode(t, a)) != string(mustEncode(t, b)) {
		t.Errorf("the way back leads to\n%s", back)
	}
}

func mustEncode(t *testing.T, v any) []byte {
	t.Helper()
	b, err := encode(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestApplyRefuses: another EncryptionConfiguration is not replaced, and other files are not
// taken for a manifest.
func TestApplyRefuses(t *testing.T) {
	for text, want := range map[string]string{
		strings.Replace(manifest, "    image:", "    - --encryption-provider-config=/etc/other.yaml\n    image:", 1): "already has",
		"":          "empty",
		"kind: Pod": "has no /spec",
		"a: [":      "yaml",
	} {
		if _, err := patch.Apply([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// TestYAML: the file is a JSON patch of additions.
func TestYAML(t *testing.T) {
	b, err := patch.YAML()
	if err != nil {
		t.Fatal(err)
	}
	var got []map[string]any
	if err := yaml.Unmarshal(b, &got); err != nil || len(got) != 5 || got[0]["op"] != "add" || got[0]["path"] != "/spec/containers/0/command/-" {
		t.Errorf("%v\n%s", err, b)
	}
}
