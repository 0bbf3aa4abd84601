//go:build cgo

package hsm

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/beezy-dev/kleidi/seal"
)

// documented is a fenced block of docs/pkcs11.md: the comment before it, its language and its text.
var documented = regexp.MustCompile("(?m)(?:^ *<!-- (.*) -->\n)? *```([a-z]+)\n((?s:.*?))^ *```$")

// TestDocument follows docs/pkcs11.md: the commands on the token as they stand there, and
// its configuration. Where kleidi's own commands come, the wrapper does their part;
// those on a serving node are run by e2e/docs.
func TestDocument(t *testing.T) {
	b := softHSM(t)
	ok(t, os.RemoveAll(b.dir))
	ok(t, os.Mkdir(b.dir, 0o700))
	etc := filepath.Join(t.TempDir(), "kleidi")
	here := strings.NewReplacer("/etc/kleidi", etc, "/usr/lib/softhsm/libsofthsm2.so", b.module)
	var w *Wrapper
	var printed string
	ran, elsewhere := 0, false
	for _, block := range documented.FindAllStringSubmatch(string(must[[]byte](t)(os.ReadFile("../docs/pkcs11.md"))), -1) {
		comment, text := block[1], here.Replace(block[3])
		switch {
		case comment == "token: a machine with SoftHSM", comment == "token: next":
			out, err := exec.Command("bash", "-euo", "pipefail", "-c", text).CombinedOutput()
			if err != nil {
				t.Fatalf("%s\n%s%v", text, out, err)
			}
			printed, elsewhere = string(out), false
			ran++
		case strings.HasPrefix(comment, "run on: a serving node"):
			elsewhere = true // by e2e/docs, until the token's turn comes again
		case comment == "run next" && elsewhere, comment == "prints" && elsewhere:
		case comment == "prints":
			for line := range strings.Lines(text) {
				if !strings.Contains(printed, strings.TrimSpace(line)) {
					t.Errorf("%q is not in what was printed:\n%s", line, printed)
				}
			}
		case comment == "configures":
			w = newWrapper(t, fromYAML(t, text))
		case comment == "run by kleidi" && strings.Contains(text, "--generate-key"):
			must[Key](t)(w.GenerateKey(t.Context()))
		case block[2] == "sh" && !strings.HasPrefix(comment, "run by kleidi") && !strings.HasPrefix(comment, "not run: "):
			t.Errorf("nothing says whether this is run:\n%s", text)
		}
	}
	if ran < 5 {
		t.Errorf("%d blocks were run", ran)
	}
	kek := newKEK(t)
	opens(t, w, must[seal.Slot](t)(w.Wrap(t.Context(), kek)), kek) // with the PIN as it was changed
}

func fromYAML(t *testing.T, text string) Config {
	t.Helper()
	var c struct {
		PKCS11 struct {
			Module  string `yaml:"module"`
			URI     string `yaml:"uri"`
			PINFile string `yaml:"pinFile"`
		} `yaml:"pkcs11"`
	}
	ok(t, yaml.Unmarshal([]byte(text), &c))
	if c.PKCS11.Module == "" || c.PKCS11.URI == "" || c.PKCS11.PINFile == "" {
		t.Fatalf("incomplete: %+v", c)
	}
	return Config{Module: c.PKCS11.Module, URI: c.PKCS11.URI, PINFile: c.PKCS11.PINFile}
}
