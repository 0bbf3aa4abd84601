package kubeadm

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

// manifest is a shortened manifest of kubeadm 1.37.
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

// TestFolder: from a folder of its own the EncryptionConfiguration is mounted with the
// folder, so that automatic reload sees a file that takes its place. A folder with kubeadm's
// credentials is not mounted.
func TestFolder(t *testing.T) {
	for file, want := range map[string]hostPath{
		"/etc/kubernetes/enc/config.yaml":         {"/etc/kubernetes/enc", "Directory"},
		"/srv/encryption.yaml":                    {"/srv", "Directory"},
		"/etc/kubernetes/kleidi-encryption.yaml":  {"/etc/kubernetes/kleidi-encryption.yaml", "File"},
		"/etc/kubernetes/../encryption.yaml":      {"/etc/kubernetes/../encryption.yaml", "File"},
		"/encryption.yaml":                        {"/encryption.yaml", "File"},
		"/etc/kubernetes-other/encryption.yaml":   {"/etc/kubernetes-other", "Directory"},
		"/etc/kubernetes/pki/etcd/encryption.yml": {"/etc/kubernetes/pki/etcd", "Directory"},
	} {
		if got := (Patch{file, "/run/kleidi/kms.sock"}).configuration().HostPath; got != want {
			t.Errorf("%s: %+v, want %+v", file, got, want)
		}
	}
}

// TestFormerMount: a manifest in which a former version mounted the file alone serves, and
// Apply makes it mount the folder. A folder that kube-apiserver has already is not mounted
// again, and stays after the way back.
func TestFormerMount(t *testing.T) {
	p := Patch{"/etc/kubernetes/enc/config.yaml", "/run/kleidi/kms.sock"}
	former, err := p.change([]byte(manifest), p.configurationFile())
	if err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]bool{manifest: false, string(former): true} {
		if got, err := p.Applied([]byte(text)); err != nil || got != want {
			t.Errorf("applied: %v %v, want %v, to\n%s", got, err, want, text)
		}
	}
	now, err := p.Apply(former)
	if fresh, _ := p.Apply([]byte(manifest)); err != nil || string(now) != string(fresh) {
		t.Errorf("%v: the former manifest became\n%s\nnot\n%s", err, now, fresh)
	}

	theirs := strings.NewReplacer(
		"    volumeMounts:\n", "    volumeMounts:\n    - {mountPath: /etc/kubernetes/enc/, name: enc}\n",
		"  volumes:\n", "  volumes:\n  - {hostPath: {path: /etc/kubernetes/enc}, name: enc}\n").Replace(manifest)
	got, err := p.Apply([]byte(theirs))
	if err != nil || strings.Contains(string(got), "kleidi-encryption") {
		t.Errorf("%v: their folder is mounted twice:\n%s", err, got)
	}
	back, err := p.Revert(got)
	if err != nil || strings.Count(string(back), "/etc/kubernetes/enc") != 2 {
		t.Errorf("%v: the way back leads to\n%s", err, back)
	}
}

// TestRevertFile: kube-apiserver keeps a file by which other providers encrypt, and kleidi's
// socket as long as the file names it beside them.
func TestRevertFile(t *testing.T) {
	const (
		kms       = `{kms: {apiVersion: v2, name: kleidi-2, endpoint: "unix:///run/kleidi/kms.sock"}}`
		secretbox = `{secretbox: {keys: [{name: key1, secret: "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}]}}`
		identity  = `{identity: {}}`
	)
	for _, c := range []struct {
		providers   []string
		refused     string
		kept, force bool
	}{
		{[]string{kms, identity}, "still makes kube-apiserver encrypt with kleidi", false, false},
		{[]string{kms, identity}, "", false, true},
		{[]string{secretbox, kms, identity}, "still makes kube-apiserver read with kleidi", false, false},
		{[]string{secretbox, kms, identity}, "", false, true},
		{[]string{secretbox}, "", true, false},
		{[]string{secretbox}, "", true, true},
		{[]string{identity, secretbox}, "", true, false},
		{[]string{identity, kms}, "still makes kube-apiserver read with kleidi", false, false},
		{[]string{identity, kms}, "", false, true},
		{[]string{identity}, "", false, false},
	} {
		dir := t.TempDir()
		p := Patch{filepath.Join(dir, "enc", "config.yaml"), "/run/kleidi/kms.sock"}
		file := filepath.Join(dir, "kube-apiserver.yaml")
		patched, err := p.Apply([]byte(manifest))
		if err := errors.Join(err, os.Mkdir(filepath.Dir(p.EncryptionConfig), 0o700), os.WriteFile(file, patched, 0o600),
			os.WriteFile(p.EncryptionConfig, []byte("apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfiguration\nresources:\n- resources: [secrets]\n  providers: ["+strings.Join(c.providers, ", ")+"]\n"), 0o600)); err != nil {
			t.Fatal(err)
		}
		changed, kept, err := p.RevertFile(file, c.force)
		after, _ := os.ReadFile(file)
		switch flagged, mounted := strings.Contains(string(after), flagName+"="+p.EncryptionConfig), strings.Contains(string(after), filepath.Dir(p.EncryptionConfig)); {
		case c.refused != "":
			if err == nil || !strings.Contains(err.Error(), c.refused) || changed || string(after) != string(patched) {
				t.Errorf("%s: %v, changed %v", c.providers, err, changed)
			}
		case err != nil || !changed || kept != c.kept || flagged != kept || mounted != kept || strings.Contains(string(after), "/run/kleidi"):
			t.Errorf("%s: %v, changed %v, kept %v\n%s", c.providers, err, changed, kept, after)
		}
	}
}

// TestTwoWords: the flag and its file may be two words of the command line.
func TestTwoWords(t *testing.T) {
	two := strings.Replace(manifest, "    image:", "    - --encryption-provider-config\n    - /etc/kubernetes/kleidi-encryption.yaml\n    image:", 1)
	patched, err := patch.Apply([]byte(two))
	if err != nil || strings.Contains(string(patched), flagName+"=") || !strings.Contains(string(patched), "path: /run/kleidi\n") {
		t.Fatalf("%v:\n%s", err, patched)
	}
	if applied, err := patch.Applied(patched); err != nil || !applied {
		t.Errorf("%v, %v", applied, err)
	}
	back, err := patch.Revert(patched)
	if err != nil || strings.Contains(string(back), "encryption") || !strings.Contains(string(back), "--advertise-address=10.99.0.1") {
		t.Errorf("%v:\n%s", err, back)
	}
	other := patch
	other.EncryptionConfig = "/etc/other.yaml"
	if _, err := other.Apply([]byte(two)); err == nil || !strings.Contains(err.Error(), "already has") {
		t.Error(err)
	}
}

// TestArgs: kube-apiserver's flags may be in args, and a flag may be the last word of command
// with its file as the first of args.
func TestArgs(t *testing.T) {
	const command = "  - command:\n    - kube-apiserver\n    - --advertise-address=10.99.0.1\n"
	const file = "/etc/kubernetes/kleidi-encryption.yaml"
	for name, c := range map[string]struct{ words, want string }{
		"args alone":        {"  - args:\n    - --advertise-address=10.99.0.1\n", "args:\n    - --advertise-address=10.99.0.1\n    - " + flagName + "=" + file + "\n"},
		"both":              {"  - args:\n    - --v=2\n    command:\n    - kube-apiserver\n", "args:\n    - --v=2\n    - " + flagName + "=" + file + "\n"},
		"empty args":        {"  - args: []\n    command: [kube-apiserver]\n", "args: [" + flagName + "=" + file + "]\n"},
		"no args":           {"  - args:\n    command: [kube-apiserver]\n", "command: [kube-apiserver, " + flagName + "=" + file + "]\n"},
		"given in args":     {"  - args: [--v=2, " + flagName + "=" + file + "]\n    command: [kube-apiserver]\n", "command: [kube-apiserver]\n"},
		"given in command":  {"  - args: [--v=2]\n    command: [kube-apiserver, " + flagName + ", " + file + "]\n", "args: [--v=2]\n"},
		"given across both": {"  - args: [" + file + "]\n    command: [kube-apiserver, " + flagName + "]\n", "args: [" + file + "]\n"},
	} {
		text := strings.Replace(manifest, command, c.words, 1)
		patched, err := patch.Apply([]byte(text))
		if err != nil || !strings.Contains(oneLine(string(patched)), oneLine(c.want)) || strings.Count(string(patched), flagName) != 1 {
			t.Errorf("%s: %v\n%s", name, err, patched)
			continue
		}
		if applied, err := patch.Applied(patched); err != nil || !applied {
			t.Errorf("%s: applied: %v, %v", name, applied, err)
		}
		back, err := patch.Revert(patched)
		if err != nil || strings.Contains(string(back), "encryption") {
			t.Errorf("%s: the way back: %v\n%s", name, err, back)
		}
		other := patch
		other.EncryptionConfig = "/etc/other.yaml"
		if _, err := other.Apply(patched); err == nil || !strings.Contains(err.Error(), "already has "+flagName+"="+file) {
			t.Errorf("%s: another file: %v", name, err)
		}
	}
}

func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

// TestApplyRefuses: another EncryptionConfiguration is not replaced, and other files are
// not mistaken for a manifest.
func TestApplyRefuses(t *testing.T) {
	for text, want := range map[string]string{
		strings.Replace(manifest, "    image:", "    - --encryption-provider-config=/etc/other.yaml\n    image:", 1): "already has",
		"":          "empty",
		"kind: Pod": "has no /spec",
		"spec: {containers: [{command: kube-apiserver, volumeMounts: []}], volumes: []}": "is not a list",
		"a: [": "yaml",
	} {
		if _, err := patch.Apply([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
}

// TestOperations: the patch has a mount unless kubeadm makes it without the patch. The
// manifest may have kleidi's own mounts, which kubeadm does not make again.
func TestOperations(t *testing.T) {
	with := func(mount, volume string) []byte {
		return []byte(strings.NewReplacer("    volumeMounts:\n", "    volumeMounts:\n    - "+mount+"\n", "  volumes:\n", "  volumes:\n  - "+volume+"\n").Replace(manifest))
	}
	enc := Patch{"/etc/kubernetes/enc/config.yaml", "/run/kleidi/kms.sock"}
	pki := Patch{"/etc/kubernetes/pki/config.yaml", "/run/kleidi/kms.sock"}
	applied, err := enc.Apply([]byte(manifest))
	if err != nil {
		t.Fatal(err)
	}
	flagged := strings.Replace(manifest, "    image:", "    - --encryption-provider-config=/etc/other.yaml\n    image:", 1)
	for name, c := range map[string]struct {
		patch   Patch
		present []byte
		want    string // the mounts
		refused string
	}{
		"no manifest":            {enc, nil, "/etc/kubernetes/enc /run/kleidi", ""},
		"kubeadm's":              {enc, []byte(manifest), "/etc/kubernetes/enc /run/kleidi", ""},
		"kleidi's":               {enc, applied, "/etc/kubernetes/enc /run/kleidi", ""},
		"their folder":           {enc, with("{mountPath: /etc/kubernetes/enc/, name: enc}", "{hostPath: {path: /etc/kubernetes/enc}, name: enc}"), "/run/kleidi", ""},
		"their socket":           {enc, with("{mountPath: /run/kleidi, name: kms}", "{hostPath: {path: /run/kleidi}, name: kms}"), "/etc/kubernetes/enc", ""},
		"another folder there":   {enc, with("{mountPath: /run/kleidi, name: kms}", "{hostPath: {path: /run/other}, name: kms}"), "", "kube-apiserver's /run/kleidi is not the host's"},
		"no folder there":        {enc, with("{mountPath: /run/kleidi, name: kms}", "{emptyDir: {}, name: kms}"), "", "kube-apiserver's /run/kleidi is not the host's"},
		"in pki":                 {pki, []byte(manifest), "/run/kleidi", ""},
		"in pki, no manifest":    {pki, nil, "/run/kleidi", ""},
		"another configuration":  {enc, []byte(flagged), "", "already has --encryption-provider-config=/etc/other.yaml"},
		"not a manifest at all":  {enc, []byte("kind: Pod"), "", "has no /spec"},
		"an empty manifest file": {enc, []byte{}, "", "empty"},
	} {
		operations, err := c.patch.Operations(c.present)
		if c.refused != "" {
			if err == nil || !strings.Contains(err.Error(), c.refused) {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		var mounts, volumes []string
		for _, o := range operations {
			switch value := o.Value.(type) {
			case mount:
				mounts = append(mounts, value.MountPath)
			case volume:
				volumes = append(volumes, value.HostPath.Path)
			}
		}
		if got := strings.Join(mounts, " "); err != nil || got != c.want || strings.Join(volumes, " ") != c.want || len(operations) != 1+2*len(mounts) {
			t.Errorf("%s: %v, %+v, want %s", name, err, operations, c.want)
		}
	}
}

// TestYAML: the file is a JSON patch of additions.
func TestYAML(t *testing.T) {
	operations, err := patch.Operations(nil)
	if err != nil {
		t.Fatal(err)
	}
	b, err := YAML(operations)
	if err != nil {
		t.Fatal(err)
	}
	var got []map[string]any
	if err := yaml.Unmarshal(b, &got); err != nil || len(got) != 5 || got[0]["op"] != "add" || got[0]["path"] != "/spec/containers/0/command/-" {
		t.Errorf("%v\n%s", err, b)
	}
}
