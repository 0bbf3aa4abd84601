package docs

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	kmsapi "k8s.io/kms/apis/v2"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// machine is a simulated machine with a separate root folder, which holds the
// documents' absolute paths.
type machine struct {
	*tpmtest.Machine
	t        *testing.T
	name     string              // of the node
	address  string              // at which other machines reach this one
	cast     map[string]*machine // the machines of a scene of several, including this one
	base     string              // the root folder
	boot     simboot.Boot
	next     simboot.Boot   // the boot that an update leads to
	binary   string         // of kleidi
	settings map[string]any // further settings of the configuration, by top-level key
	noTPM    bool
	keyID    string // current key ID when the scene was ready, for --trust-key-id
	serving  *node.Process
	before   *kmsapi.EncryptResponse // a DEK seed, encrypted before the scene
}

var seed = bytes.Repeat([]byte("documents"), 4)[:32]

func newMachine(t *testing.T) *machine {
	t.Helper()
	boot := simboot.Baseline(simboot.UKI)
	m := &machine{Machine: tpmtest.New(t, boot), t: t, name: "cp-1", boot: boot, binary: node.Binary(t), settings: map[string]any{}}
	m.base = filepath.Join(m.Dir(), "r")
	// Folders of the system and of the unit's tmpfiles. The documents make all others.
	for _, dir := range []string{"bin", "root", "etc", "media/usb", "run/kleidi", "usr/local/bin", "var/lib"} {
		if err := os.MkdirAll(m.root(dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// kleidi status reports the state in its exit code, which is not a failure of the
	// command.
	m.write("bin/sudo", "#!/bin/sh\n\"$@\" && exit\ncode=$?\n[ \"$1 $2\" != 'kleidi status' ] || [ $code -lt 3 ] || exit 0\nexit $code\n", 0o755)
	m.makeFolders()
	m.configure()
	m.writeKleidi()
	m.writeSystemctl()
	if err := os.Symlink(build(t, "filippo.io/age/cmd/age-keygen", "0"), m.root("bin/age-keygen")); err != nil {
		t.Fatal(err)
	}
	return m
}

// makeFolders makes the folders that the installation makes, because each task begins
// after it.
func (m *machine) makeFolders() {
	m.t.Helper()
	for _, b := range blocks(m.t, "../../docs/operations.md") {
		if !b.commands || !strings.HasPrefix(b.comment, "not run: needs systemd") {
			continue
		}
		for _, line := range strings.Split(b.text, "\n") {
			if strings.HasPrefix(line, "sudo install -d ") {
				m.must(line)
			}
		}
	}
}

func (m *machine) root(path string) string { return filepath.Join(m.base, path) }

// writeKleidi makes the command kleidi, with this machine's configuration.
func (m *machine) writeKleidi() {
	m.write("bin/kleidi", fmt.Sprintf("#!/bin/sh\nexec %s --config %s \"$@\"\n", m.binary, m.root("etc/kleidi/config.yaml")), 0o755)
}

// set adds settings to the configuration. They replace those with the same top-level
// key.
func (m *machine) set(settings string) {
	m.t.Helper()
	if err := yaml.Unmarshal([]byte(m.relocate(settings)), &m.settings); err != nil {
		m.t.Fatalf("%s: %v", settings, err)
	}
	m.configure()
}

func (m *machine) configure() {
	m.t.Helper()
	var settings bytes.Buffer
	if len(m.settings) > 0 {
		y := yaml.NewEncoder(&settings)
		y.SetIndent(2) // the usual style, which the commands that edit the file expect
		if err := y.Encode(m.settings); err != nil {
			m.t.Fatal(err)
		}
	}
	device := m.Device()
	if m.noTPM {
		device = m.root("dev/tpmrm0")
	}
	m.write("etc/kleidi/config.yaml", fmt.Sprintf(`apiVersion: kleidi.beezy.dev/v1alpha1
kind: KleidiConfiguration
node: %s
tpm: {device: "%s", eventLog: %s, userspaceEventLog: %s}
state: {dir: %s}
kms: {socket: %s}
admin: {socket: %s}
http: {socket: %s}
%s`, m.name, device, m.EventLog(), m.UserspaceLog(), m.root("var/lib/kleidi"), m.root("run/kleidi/kms.sock"), m.root("run/kleidi/admin.sock"), m.root("run/kleidi/http.sock"), settings.String()), 0o600)
}

func (m *machine) write(path, content string, mode os.FileMode) {
	m.t.Helper()
	if err := os.WriteFile(m.root(path), []byte(content), mode); err != nil {
		m.t.Fatal(err)
	}
}

// built are the programs that the machines share, in scratch: paths by package.
var (
	built   = map[string]string{}
	scratch string
)

func TestMain(m *testing.M) {
	var err error
	if scratch, err = os.MkdirTemp("", "kleidi-docs"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	_ = os.RemoveAll(scratch)
	os.Exit(code)
}

// build builds a program once.
func build(t *testing.T, pkg, cgo string) string {
	t.Helper()
	if built[pkg] == "" {
		path := filepath.Join(scratch, filepath.Base(pkg))
		cmd := exec.Command("go", "build", "-o", path, pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED="+cgo)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go build %s: %v\n%s", pkg, err, out)
		}
		built[pkg] = path
	}
	return built[pkg]
}

// shell runs a document's commands, all of which must succeed.
func (m *machine) shell(commands string) (string, error) {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(m.t.Context(), 10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-c", m.relocate(commands))
	cmd.Dir = m.root("root")
	cmd.Env = append(os.Environ(), "PATH="+m.root("bin")+":"+m.root("usr/local/sbin")+":"+os.Getenv("PATH"), "KEY_ID="+m.keyID)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		return "", err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for {
		select {
		case err := <-ended:
			return out.String(), err
		case <-time.After(20 * time.Millisecond):
			m.obeySystemctl()
		}
	}
}

// relocate replaces the documents' absolute paths with this machine's.
func (m *machine) relocate(commands string) string {
	for _, dir := range []string{"/etc/", "/media/", "/opt/", "/var/lib/", "/run/", "/boot/", "/efi/", "/usr/local/"} {
		commands = strings.ReplaceAll(commands, " "+dir, " "+m.root(dir)+"/")
	}
	if m.cast != nil {
		commands = strings.ReplaceAll(commands, " "+documented, " "+m.seat().address)
	}
	return strings.ReplaceAll(commands, " /sys/kernel/security/tpm0/binary_bios_measurements", " "+m.EventLog())
}

// must runs commands that prepare a scene.
func (m *machine) must(commands string) string {
	m.t.Helper()
	out, err := m.shell(commands)
	if err != nil {
		m.t.Fatalf("%s: %v\n%s", commands, err, out)
	}
	return out
}

func (m *machine) exists(path string) bool {
	_, err := os.Stat(m.root(path))
	return err == nil
}

func (m *machine) get(path string) (code int, body string, err error) {
	return node.Get(m.root("run/kleidi/http.sock"), path)
}

func (m *machine) client() kmsapi.KeyManagementServiceClient {
	m.t.Helper()
	conn, err := grpc.NewClient("unix://"+m.root("run/kleidi/kms.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { _ = conn.Close() })
	return kmsapi.NewKeyManagementServiceClient(conn)
}

// encryptSeed encrypts a seed, as kube-apiserver did before the scene.
func (m *machine) encryptSeed() {
	m.t.Helper()
	var err error
	if m.before, err = m.client().Encrypt(m.t.Context(), &kmsapi.EncryptRequest{Uid: "before", Plaintext: seed}); err != nil {
		m.t.Fatal(err)
	}
	m.keyID = m.before.KeyId
}

func (m *machine) checkNothingLost() {
	m.t.Helper()
	if code, body, err := m.get("/readyz"); err != nil || code != http.StatusOK {
		m.t.Fatalf("kleidi is not open at the end: %d %s (%v)", code, body, err)
	}
	if m.before == nil {
		m.encryptSeed()
	}
	r, err := m.client().Decrypt(m.t.Context(), &kmsapi.DecryptRequest{Uid: "after", Ciphertext: m.before.Ciphertext, KeyId: m.before.KeyId})
	if err != nil || !bytes.Equal(r.Plaintext, seed) {
		m.t.Fatalf("what was encrypted before the scene does not decrypt: %v", err)
	}
}
