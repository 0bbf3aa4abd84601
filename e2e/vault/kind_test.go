package vault

import (
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/beezy-dev/kleidi/e2e/kind"
)

// TestKindPod: the pod of deploy/kind/vault opens by AppRole, with the key and the rights of
// its setup, and by the ServiceAccount once its token is there.
func TestKindPod(t *testing.T) {
	d := newDocumented(t)
	setup, err := os.ReadFile("../../deploy/kind/vault/setup")
	if err != nil {
		t.Fatal(err)
	}
	p := kind.NewPod(t, "vault")
	for _, name := range []string{"config.yaml", "kubernetes.yaml"} {
		b, err := os.ReadFile(p.Path("kind/kleidi/" + name))
		if err != nil {
			t.Fatal(err)
		}
		// A busy machine may need more than the 15 s of an operation.
		here := strings.Replace(string(b), "https://kleidi-vault:8200", d.url+"\n  timeout: 1m", 1)
		if here == string(b) {
			t.Fatalf("%s names another address", name)
		}
		writeFile(t, p.Path("kind/kleidi/"+name), here)
	}
	if err := os.Mkdir(p.Path("kind/kleidi/vault"), 0o700); err != nil {
		t.Fatal(err)
	}
	writeFile(t, p.Path("kind/kleidi/vault/ca.pem"), string(d.ca.pem))
	writeFile(t, p.Path("kind/kleidi/vault/secret-id"), lastLine(d.run(string(setup))))
	p.Start()
	keyring := p.Kleidi("keyring", "show")
	p.Kleidi("slot", "test")

	// as deploy/kind/vault/login does it
	auth := kubernetesAuth(d.server)
	token, err := os.ReadFile(auth.JWTFile)
	if err != nil {
		t.Fatal(err)
	}
	writeFile(t, p.Path("var/lib/kleidi-kind/token"), string(token))
	d.remove("sys/auth/approle")
	p.Stop(syscall.SIGTERM)
	p.Start()
	p.Kleidi("slot", "test")
	if now := p.Kleidi("keyring", "show"); now != keyring {
		t.Errorf("the keyring is\n%s\nnot\n%s", now, keyring)
	}
}

func writeFile(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}
