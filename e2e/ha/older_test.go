package ha

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/e2e/node"
)

// beforeSeveral is the last commit before format 2.
const beforeSeveral = "ffba0ec"

// TestOlderBinary: an older binary does not open a keyring of a later format, says why,
// and never overwrites it. The binary comes from the history of the repository. If the
// checkout has no history, this version's binary meets a format of the future instead,
// which leads to the same refusal.
func TestOlderBinary(t *testing.T) {
	n := node.Make(t, node.Setup{Settings: "node: cp-1\njoin:\n  listen: 127.0.0.1:" + node.FreePort(t) + "\n"})
	policy := n.Path("policy.yaml")
	n.Run("bootpolicy", "record", "--file", policy)
	n.ServeOpen()
	n.Run("node", "approve", "cp-2", "--ek", "sha256:"+strings.Repeat("0", 64), "--boot-policy", policy)
	n.Serving.Stop()
	file := n.Path("state/keyring.json")
	real, err := os.ReadFile(file)
	must(t, err)

	old, says := olderBinary(t, beforeSeveral), "section" // the field of format 2 that the older binary does not know
	if old == "" {
		old, says = node.Binary(t), "format 3"
		must(t, os.WriteFile(file, bytes.Replace(real, []byte("eyJmb3JtYXQiOjIs"), []byte("eyJmb3JtYXQiOjMs"), 1), 0o600)) // {"format":2, in base64
	}
	// The older binary knows neither join.listen nor http.socket.
	n.Configure("node: cp-1\n")
	config, err := os.ReadFile(n.Path("config.yaml"))
	must(t, err)
	plain := regexp.MustCompile(`http:\n  socket: .*\n`).ReplaceAll(config, nil)
	must(t, os.WriteFile(n.Path("older.yaml"), plain, 0o600))
	refuses(t, old, n, n.Path("older.yaml"), n.Identity, says)
	must(t, os.WriteFile(file, real, 0o600))
	n.ServeOpen()
}

// refuses demands that a binary does not open the keyring of a node, says why, and never
// overwrites it.
func refuses(t *testing.T, binary string, n *node.Node, config, identity, says string) {
	t.Helper()
	file := n.Path("state/keyring.json")
	stored, err := os.ReadFile(file)
	must(t, err)
	for _, line := range []string{"keyring show", "rotate", "reseal", "recover --identity-file " + identity, "init --recovery-recipient age1lggyhqrw2nlhcxprm67z43rta597azn8gknawjehu9d9dl0jq3yqqvfafg"} {
		out, err := exec.Command(binary, append(strings.Fields(line), "--config", config)...).CombinedOutput()
		if err == nil {
			t.Errorf("kleidi %s: an older binary succeeds:\n%s", line, out)
		}
		if !strings.HasPrefix(line, "init") && !strings.Contains(string(out), says) {
			t.Errorf("kleidi %s does not say %q:\n%s", line, says, out)
		}
		if now, err := os.ReadFile(file); err != nil || !bytes.Equal(now, stored) {
			t.Errorf("kleidi %s has changed the keyring: %v", line, err)
		}
	}
}

// olderBinary returns kleidi as it was at a commit, or "" if the checkout does not have that
// commit.
func olderBinary(t *testing.T, commit string) string {
	t.Helper()
	binary, err := buildOlder(commit)
	must(t, err)
	if binary == "" {
		t.Logf("the checkout has no commit %s", commit)
	}
	return binary
}

// buildOlder builds it, once, into the cache folder.
func buildOlder(commit string) (binary string, err error) {
	if exec.Command("git", "cat-file", "-e", commit+"^{commit}").Run() != nil {
		return "", nil
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	binary = filepath.Join(cache, "kleidi", "older", commit, "kleidi")
	if _, err := os.Stat(binary); err == nil {
		return binary, nil
	}
	dir, err := os.MkdirTemp("", "kleidi-older")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	script := `set -e; git -C "$(git rev-parse --show-toplevel)" archive "$1" | tar -x -C "$2"; cd "$2"; CGO_ENABLED=0 go build -o "$2/kleidi.new" ./cmd/kleidi; mkdir -p "${3%/*}"; mv "$2/kleidi.new" "$3.$$"; mv "$3.$$" "$3"`
	if out, err := exec.Command("bash", "-c", script, "bash", commit, dir, binary).CombinedOutput(); err != nil {
		return "", fmt.Errorf("build kleidi %s: %w\n%s", commit, err, out)
	}
	return binary, nil
}
