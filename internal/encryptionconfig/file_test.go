package encryptionconfig

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestFind: kube-apiserver's command line decides, then the usual paths.
func TestFind(t *testing.T) {
	root := t.TempDir()
	write := func(path, text string) {
		t.Helper()
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want := func(path string) {
		t.Helper()
		if got, err := Find(root); err != nil || got != filepath.Join(root, path) {
			t.Errorf("%s, %v; want %s", got, err, path)
		}
	}
	if _, err := Find(root); err == nil || !strings.Contains(err.Error(), "--encryption-config") {
		t.Error(err)
	}
	write("var/lib/rancher/k3s/server/cred/encryption-config.json", "{}")
	want("var/lib/rancher/k3s/server/cred/encryption-config.json")
	write("etc/rancher/k3s/config.yaml", "kube-apiserver-arg:\n  # - encryption-provider-config=/no\n  - 'encryption-provider-config-automatic-reload=true'\n  - \"encryption-provider-config=/etc/k3s.yaml\"\n")
	want("etc/k3s.yaml")
	write("etc/kubernetes/manifests/kube-apiserver.yaml", "spec:\n  containers:\n  - command:\n    - kube-apiserver\n    - --encryption-provider-config-automatic-reload=true\n    - --encryption-provider-config=/etc/kubernetes/e.yaml\n")
	want("etc/kubernetes/e.yaml")
	for _, command := range []string{
		"command:\n    - kube-apiserver\n    - --encryption-provider-config\n    - /etc/f.yaml\n    - --encryption-provider-config-automatic-reload\n    - --v=2\n",
		"command:\n    - \"--encryption-provider-config\" # kleidi's\n    - '/etc/f.yaml'\n",
		`command: ["kube-apiserver", "--encryption-provider-config", "/etc/f.yaml"]`,
		"command:\n    - --encryption-provider-config=/etc/f.yaml\n    volumeMounts:\n    - name: encryption-provider-config\n    - mountPath: /etc\n  volumes:\n  - name: encryption-provider-config\n  - hostPath: {path: /etc}\n",
		`command: [kube-apiserver, --encryption-provider-config=/etc/former.yaml, --encryption-provider-config, /etc/f.yaml, --v=2]`,
	} {
		write("etc/kubernetes/manifests/kube-apiserver.yaml", "spec:\n  containers:\n  - "+command)
		want("etc/f.yaml")
	}
}

// TestWrite: the file is replaced, with its former content kept, and only its owner reads
// both.
func TestWrite(t *testing.T) {
	file := filepath.Join(t.TempDir(), "there", "encryption.yaml")
	one, two := config(t, "secrets: aescbc identity"), config(t, "secrets: aescbc kleidi/run/kleidi/kms.sock")
	w, err := one.Write(file)
	if err != nil || w.Former != "" {
		t.Fatal(w, err)
	}
	before, _ := os.ReadFile(file)
	if w, err = one.Write(file); err != nil || w.Former != "" {
		t.Errorf("the same again: %+v, %v", w, err)
	}
	link := filepath.Join(t.TempDir(), "link.yaml")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(file, 0o644); err != nil {
		t.Fatal(err)
	}
	if w, err = two.Write(link); err != nil {
		t.Fatal(err)
	}
	if kept, err := os.ReadFile(w.Former); err != nil || string(kept) != string(before) {
		t.Errorf("the copy: %v", err)
	}
	for _, path := range []string{file, w.Former} {
		if info, err := os.Lstat(path); err != nil || info.Mode() != 0o600 {
			t.Errorf("%s: %v, %v", path, info.Mode(), err)
		}
	}
	if got, err := Read(file); err != nil || len(words(got)) != 1 || words(got)[0] != words(two)[0] {
		t.Errorf("%v", err)
	}
	if _, err := two.Write("/var/lib/rancher/rke2/server/cred/encryption-config.json"); err == nil || !strings.Contains(err.Error(), "kube-apiserver-arg") {
		t.Error(err)
	}
}

// TestTooLarge: no resource is lost behind the limit, and no former file is cut.
func TestTooLarge(t *testing.T) {
	file := filepath.Join(t.TempDir(), "encryption.yaml")
	e := config(t, "secrets: aescbc", "configmaps: aescbc")
	first, second, _ := strings.Cut(e.YAML(), "  - resources:\n      - configmaps")
	long := first + strings.Repeat("# comment\n", maxSize/10) + "  - resources:\n      - configmaps" + second
	if err := os.WriteFile(file, []byte(long), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := Read(file); err == nil || !strings.Contains(err.Error(), "too many") {
		t.Errorf("%v, %v", got, err)
	}
	if w, err := e.Write(file); err == nil {
		t.Errorf("%+v", w)
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != long {
		t.Errorf("the file has changed: %v", err)
	}
}

// TestWriteNew: a new file is written, the same content is accepted, and another content
// is refused and kept.
func TestWriteNew(t *testing.T) {
	path := filepath.Join(t.TempDir(), "folder", "encryption.yaml")
	e := New("kleidi", "/run/kleidi/kms.sock", []string{"secrets"})
	for range 2 {
		if err := e.WriteNew(path); err != nil {
			t.Fatal(err)
		}
	}
	other := New("kleidi", "/run/kleidi/other.sock", []string{"secrets"})
	if err := other.WriteNew(path); err == nil || !strings.Contains(err.Error(), "exists with another content") {
		t.Error(err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != e.YAML() {
		t.Errorf("%s, %v", b, err)
	}
}
