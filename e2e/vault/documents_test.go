package vault

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/beezy-dev/kleidi/vault"
)

// block is a fenced block of docs/vault.md with the comment before it.
type block struct{ comment, language, text string }

var fenced = regexp.MustCompile("(?ms)^<!-- ([^\n]*) -->\n```([a-z]*)\n(.*?)^```$")

func blocks(t *testing.T) (all []block) {
	t.Helper()
	b, err := os.ReadFile("../../docs/vault.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range fenced.FindAllStringSubmatch(string(b), -1) {
		all = append(all, block{m[1], m[2], m[3]})
	}
	if shown := strings.Count(string(b), "```sh\n") + strings.Count(string(b), "```yaml\n") + strings.Count(string(b), "```text\n"); shown != len(all) {
		t.Fatalf("%d blocks, of which %d have a comment", shown, len(all))
	}
	return all
}

// documented is the place where the document's commands run.
type documented struct {
	*server
	folder string // stands for /etc/kleidi/vault
	bin    string
}

func newDocumented(t *testing.T) *documented {
	t.Helper()
	s := startServer(t)
	d := &documented{server: s, folder: filepath.Join(s.dir, "etc"), bin: filepath.Join(s.dir, "bin")}
	for _, dir := range []string{d.folder, d.bin} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, filepath.Join(d.bin, commandName)); err != nil {
		t.Fatal(err)
	}
	d.copy("ca.pem", "etc/ca.pem")
	d.write("etc/kleidi.hcl", []byte(documentedRules(t)))
	return d
}

// run runs a block like an operator with the vault command, and returns its output.
func (d *documented) run(text string, variables ...string) string {
	d.t.Helper()
	here := strings.NewReplacer("/etc/kleidi/vault", d.folder, "/etc/systemd", d.path("systemd"))
	cmd := exec.Command("sh", "-euc", here.Replace(text))
	cmd.Dir = d.folder
	cmd.Env = append(os.Environ(), "PATH="+d.bin+":"+os.Getenv("PATH"), "VAULT_ADDR="+d.url, "VAULT_CACERT="+d.path("ca.pem"), "VAULT_TOKEN="+d.root.Token())
	cmd.Env = append(cmd.Env, variables...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		d.t.Fatalf("%s: %v\n%s", text, err, out)
	}
	return string(out)
}

// configured is the wrapper that a block of the document configures.
func (d *documented) configured(text string) *vault.Wrapper {
	d.t.Helper()
	text = strings.ReplaceAll(text, "/etc/kleidi/vault", d.folder)
	text = strings.ReplaceAll(text, "/var/run/secrets/vault", d.folder)
	var file struct {
		Vault struct {
			Address, Namespace, Mount, Key string
			CAFile                         string `yaml:"caFile"`
			Auth                           struct {
				Method, Role    string
				RoleID          string `yaml:"roleID"`
				SecretIDFile    string `yaml:"secretIDFile"`
				SecretIDWrapped bool   `yaml:"secretIDWrapped"`
				TokenFile       string `yaml:"tokenFile"`
				JWTFile         string `yaml:"jwtFile"`
				CertFile        string `yaml:"certFile"`
				KeyFile         string `yaml:"keyFile"`
			}
		}
	}
	decoder := yaml.NewDecoder(strings.NewReader(text))
	decoder.KnownFields(true)
	if err := decoder.Decode(&file); err != nil {
		d.t.Fatalf("%s: %v", text, err)
	}
	v, a := file.Vault, file.Vault.Auth
	if v.Address != "https://vault.example:8200" {
		d.t.Errorf("the address is %q", v.Address)
	}
	return d.wrapper(vault.Config{Address: d.url, Namespace: v.Namespace, Mount: v.Mount, Key: v.Key, CAFile: v.CAFile, Timeout: time.Minute,
		Auth: vault.Auth{Method: vault.Method(a.Method), Role: a.Role, RoleID: a.RoleID, SecretIDFile: a.SecretIDFile,
			SecretIDWrapped: a.SecretIDWrapped, TokenFile: a.TokenFile, JWTFile: a.JWTFile, CertFile: a.CertFile, KeyFile: a.KeyFile}})
}

// prepare makes the things that the document expects the operator to have.
func (d *documented) prepare(method string) (variables []string) {
	d.t.Helper()
	switch method {
	case "cert":
		d.write("etc/node-ca.pem", d.ca.pem)
		d.ca.issue(d.t, d.path("node"), "node-1")
		d.copy("node.crt", "etc/node.pem")
		d.copy("node.key", "etc/node-key.pem")
	case "kubernetes":
		a := startAPIServer(d.t, d.server)
		a.reviewer(d.t)
		a.account(d.t, "kleidi")
		d.write("etc/kubernetes-ca.pem", a.ca)
		d.write("etc/reviewer.jwt", []byte(a.serviceToken(d.t, "vault-reviewer", "https://kubernetes.default.svc")))
		d.write("etc/token", []byte(a.serviceToken(d.t, "kleidi", "vault")))
		return []string{"KUBERNETES=" + a.url}
	case "jwt":
		key := newKey(d.t)
		d.write("etc/issuer.pem", publicPEM(d.t, key))
		d.write("etc/jwt", []byte(newJWT(d.t, key, "node-1")))
	}
	return nil
}

// TestDocument follows docs/vault.md: the server's set-up, each method with the
// configuration that is shown for it, then the rotation of the Transit key.
func TestDocument(t *testing.T) {
	d := newDocumented(t)
	all := blocks(t)
	kek := newKEK(t)
	var last *vault.Wrapper
	yamls := map[string]string{}
	roleID, onNode, ran := "", "", 0
	tpmKey := newInTPM(d)
	for _, b := range all {
		method, isMethod := strings.CutPrefix(b.comment, "run next: ")
		configures, isYAML := strings.CutPrefix(b.comment, "configures: ")
		switch {
		case configures == "cert, key in the TPM":
			yamls[configures] = b.text
			tpmKey.configured(b.text)
		case b.comment == "run on: the node", b.comment == "run on: the CA":
			tpmKey.run(b.text)
		case b.comment == "run on: the node, when PCR 7 has changed":
			tpmKey.changed(b.text)
		case isYAML:
			yamls[configures] = strings.Replace(b.text, "ROLE_ID", roleID, 1)
			last = d.configured(yamls[configures])
			checkOpens(t, last, wrap(t, last, kek), kek)
		case b.comment == "run on: a serving node":
			tpmKey.serve()
			d.run(b.text)
		case b.comment == "run next: on the node":
			onNode = d.run(b.text)
		case b.comment == "prints":
			prints(t, onNode, b.text)
		case b.comment == "run on: a Vault server", b.comment == "run next":
			d.run(b.text)
		case method == "approle-wrapped":
			d.run(b.text)
			last = d.configured(yamls["approle"] + "    secretIDWrapped: true\n")
			checkOpens(t, last, wrap(t, last, kek), kek)
		case method == "after the slots were rewrapped":
			d.raise(last, b.text)
		case isMethod:
			printed := d.run(b.text, d.prepare(method)...)
			if method == "approle" {
				roleID = lastLine(printed)
			}
		default:
			t.Errorf("nothing is done with the block %q", b.comment)
		}
		ran++
	}
	if len(yamls) != 6 {
		t.Errorf("%d ways to log in are shown, want 6", len(yamls))
	}
	t.Logf("%d blocks", ran)
}

// prints demands every line of text in the output. … stands for anything, and a space for
// any number of spaces.
func prints(t *testing.T, printed, text string) {
	t.Helper()
	for line := range strings.Lines(text) {
		parts := strings.Fields(line)
		for i, p := range parts {
			parts[i] = strings.ReplaceAll(regexp.QuoteMeta(p), "…", ".*")
		}
		if !regexp.MustCompile(`(?m)^ *` + strings.Join(parts, " +") + ` *$`).MatchString(printed) {
			t.Errorf("the commands do not print %sbut:\n%s", line, printed)
		}
	}
}

func lastLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return lines[len(lines)-1]
}

// raise finishes a rotation of the Transit key.
func (d *documented) raise(w *vault.Wrapper, text string) {
	d.t.Helper()
	kek := newKEK(d.t)
	slot := wrap(d.t, w, kek)
	if v := version(d.t, slot); v != 2 {
		d.t.Errorf("a slot is of version %d after the rotation", v)
	}
	d.run(text)
	checkOpens(d.t, w, slot, kek)
}

// TestMessagesOfTheDocument: the messages in the document's table are those of the
// program.
func TestMessagesOfTheDocument(t *testing.T) {
	b, err := os.ReadFile("../../docs/vault.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{vault.ErrSealed, vault.ErrStandby, vault.ErrRateLimited, vault.ErrLogin, vault.ErrToken, vault.ErrDenied,
		vault.ErrKeyMissing, vault.ErrMountMissing, vault.ErrTooOld, vault.ErrNotVault} {
		if !strings.Contains(string(b), fmt.Sprintf("| `%s", err)) {
			t.Errorf("docs/vault.md has no row for %q", err)
		}
	}
}
