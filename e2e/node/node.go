package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// Node is a machine with a TPM on which kleidi is initialised.
type Node struct {
	*tpmtest.Machine
	// Kernel is the boot that the KEK was first sealed to.
	Kernel simboot.Boot
	// Identity is the file that holds the recovery identity.
	Identity string
	// Serving is the running `kleidi serve`, once Serve was called.
	Serving *Process

	t      testing.TB
	kleidi []string // the command
	noTPM  bool
}

// Setup lists the differences from the node of [New].
type Setup struct {
	// Binary is kleidi's path; empty means the result of [Binary].
	Binary string
	// On is put before kleidi's command line, to run it on another host.
	On []string
	// Settings are added to the configuration: YAML of top-level keys.
	Settings string
	// NoTPM leaves the machine without a TPM.
	NoTPM bool
	// Init are flags of init that replace the recovery recipient.
	Init []string
	// Uninitialised leaves init to the test.
	Uninitialised bool
}

// New boots a machine from a unified kernel image and runs `kleidi init` on it.
func New(t testing.TB) *Node {
	t.Helper()
	return Make(t, Setup{})
}

// Make does the same as New, with another set-up.
func Make(t testing.TB, s Setup) *Node {
	t.Helper()
	if s.Binary == "" {
		s.Binary = Binary(t)
	}
	boot := simboot.Baseline(simboot.UKI)
	n := &Node{Machine: tpmtest.New(t, boot), Kernel: boot, t: t, kleidi: append(slices.Clone(s.On), s.Binary), noTPM: s.NoTPM}
	if err := os.Mkdir(n.Path("run"), 0o700); err != nil {
		t.Fatal(err)
	}
	n.Configure(s.Settings)
	if s.Uninitialised {
		return n
	}
	if s.Init == nil {
		s.Init = []string{"--recovery-recipient", n.makeIdentity()}
	}
	n.Run("init", s.Init...)
	return n
}

// Binary returns the path of kleidi: the path in the variable KLEIDI, or bin/kleidi in
// the nearest folder above.
func Binary(t testing.TB) string {
	t.Helper()
	if path := os.Getenv("KLEIDI"); path != "" {
		return path
	}
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for ; ; dir = filepath.Dir(dir) {
		path := filepath.Join(dir, "bin", "kleidi")
		if _, err := os.Stat(path); err == nil {
			return path
		}
		if dir == filepath.Dir(dir) {
			t.Fatal("bin/kleidi is not built; run make build, or set KLEIDI to its path")
		}
	}
}

// Path names a file in the machine's folder.
func (n *Node) Path(name string) string { return filepath.Join(n.Dir(), name) }

func (n *Node) write(name, content string) {
	n.t.Helper()
	if err := os.WriteFile(n.Path(name), []byte(content), 0o600); err != nil {
		n.t.Fatal(err)
	}
}

// Configure writes the configuration again with these settings added: YAML of top-level
// keys. A running kleidi reads it at its next start.
func (n *Node) Configure(settings string) {
	n.t.Helper()
	device := n.Device()
	if n.noTPM {
		device = n.Path("no-tpm")
	}
	n.write("config.yaml", fmt.Sprintf(`apiVersion: kleidi.beezy.dev/v1alpha1
kind: KleidiConfiguration
tpm:
  device: %s
  eventLog: %s
state:
  dir: %s
kms:
  socket: %s
admin:
  socket: %s
http:
  socket: %s
%s
`, device, n.EventLog(), n.Path("state"), n.Path("run/kms.sock"), n.Path("run/admin.sock"), n.Path("run/http.sock"), settings))
}

// makeIdentity makes the recovery identity as an operator would with age-keygen,
// and returns its recipient.
func (n *Node) makeIdentity() string {
	n.t.Helper()
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		n.t.Fatal(err)
	}
	n.write("recovery.txt", identity.String()+"\n")
	n.Identity = n.Path("recovery.txt")
	return identity.Recipient().String()
}

// Run runs a kleidi command, which must succeed, and returns its output.
func (n *Node) Run(verb string, args ...string) []byte {
	n.t.Helper()
	out, err := n.Try(verb, args...)
	if err != nil {
		n.t.Fatal(err)
	}
	return out
}

// JSON runs a verb of kleidi with -o json, and reads what it prints.
func (n *Node) JSON(result any, verb string, args ...string) {
	n.t.Helper()
	if err := json.Unmarshal(n.Run(verb, append(args, "-o", "json")...), result); err != nil {
		n.t.Fatal(err)
	}
}

// Try runs a kleidi command, which may fail.
func (n *Node) Try(verb string, args ...string) ([]byte, error) {
	var stderr bytes.Buffer
	cmd := n.Command(verb, args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var exit *exec.ExitError
	if verb == "status" && errors.As(err, &exit) && exit.ExitCode() > 2 {
		return out, nil // exit codes for "locked" and "problem": the output shows the state
	}
	if err != nil {
		return out, fmt.Errorf("kleidi %s: %w\n%s%s", verb, err, out, stderr.Bytes())
	}
	return out, nil
}

// Command returns a kleidi command that was not started yet.
func (n *Node) Command(verb string, args ...string) *exec.Cmd {
	line := slices.Concat(n.kleidi, []string{verb}, args, []string{"--config", n.Path("config.yaml")})
	return exec.Command(line[0], line[1:]...)
}

// Serve starts kleidi and returns once it answers over HTTP, open or locked.
func (n *Node) Serve() {
	n.t.Helper()
	line := slices.Concat(n.kleidi, []string{"serve", "--config", n.Path("config.yaml")})
	n.Serving = Start(n.t, n.Path("kleidi.log"), line[0], line[1:]...)
	Eventually(n.t, 5*time.Minute, "kleidi serves", func() error {
		if err := n.Serving.Alive(); err != nil {
			n.t.Fatal(err)
		}
		_, _, err := n.Get("/livez")
		return err
	})
}

// ServeOpen starts kleidi and returns once its KEK is open.
func (n *Node) ServeOpen() {
	n.t.Helper()
	n.Serve()
	n.WaitOpen()
}

// WaitOpen returns once kleidi's KEK is open.
func (n *Node) WaitOpen() {
	n.t.Helper()
	Eventually(n.t, 5*time.Minute, "kleidi is open", func() error {
		code, body, err := n.Get("/readyz")
		if err == nil && code != http.StatusOK {
			err = errors.New(body)
		}
		return err
	})
}

// WaitLocked returns once kleidi's readyz says that kleidi is locked, and names a PCR.
// `kleidi status` must name the same PCR.
func (n *Node) WaitLocked(pcr string) {
	n.t.Helper()
	Eventually(n.t, 5*time.Minute, "kleidi says that it is locked", func() error {
		code, body, err := n.Get("/readyz")
		if err == nil && (code != http.StatusServiceUnavailable || !strings.Contains(body, "locked") || !strings.Contains(body, pcr)) {
			err = fmt.Errorf("readyz: %d: %s", code, body)
		}
		return err
	})
	status, err := n.Try("status")
	said := string(status)
	if err != nil {
		said += err.Error()
	}
	for _, word := range []string{"locked", pcr} {
		if !strings.Contains(said, word) {
			n.t.Errorf("kleidi status does not say %q:\n%s", word, said)
		}
	}
}

// Get asks kleidi for health or metrics.
func (n *Node) Get(path string) (code int, body string, err error) {
	return Get(n.Path("run/http.sock"), path)
}

// Get asks any HTTP server on a unix socket.
func Get(socket, path string) (code int, body string, err error) {
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	res, err := client.Get("http://kleidi" + path)
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	return res.StatusCode, string(b), err
}

// Calls returns the number of KMS v2 calls of a method (Status, Encrypt, Decrypt) that
// kleidi has answered since its start, according to its metrics.
func (n *Node) Calls(method string) int {
	n.t.Helper()
	_, body, err := n.Get("/metrics")
	if err != nil {
		n.t.Fatal(err)
	}
	sum, found := 0, false
	for line := range strings.Lines(body) {
		if !strings.HasPrefix(line, "kleidi_kms_operations_total{") || !strings.Contains(line, `method="`+method+`"`) {
			continue
		}
		fields := strings.Fields(line)
		count, err := strconv.Atoi(fields[len(fields)-1])
		if err != nil {
			n.t.Fatal(err)
		}
		sum, found = sum+count, true
	}
	if !found {
		n.t.Fatalf("kleidi's metrics do not count %s:\n%s", method, body)
	}
	return sum
}

// Keyring is the part of `kleidi keyring show -o json` that the tests read.
type Keyring struct {
	ClusterID string
	Revision  uint64
	Current   struct{ KeyID string }
	Retired   []struct{ KeyID string }
	Slots     []seal.Slot
}

// Keyring describes the keyring.
func (n *Node) Keyring() Keyring {
	n.t.Helper()
	var k Keyring
	if err := json.Unmarshal(n.Run("keyring", "show", "-o", "json"), &k); err != nil {
		n.t.Fatal(err)
	}
	if k.Current.KeyID == "" {
		n.t.Fatal("kleidi keyring show -o json names no current key ID")
	}
	return k
}

// EncryptionConfig writes the output of `kleidi encryption-config` into a file for
// kube-apiserver's --encryption-provider-config, and returns the path of the file.
func (n *Node) EncryptionConfig(args ...string) string {
	n.t.Helper()
	n.write("encryption.yaml", string(n.Run("encryption-config", args...)))
	return n.Path("encryption.yaml")
}
