package kill

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"filippo.io/age"
	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	kmsapi "k8s.io/kms/apis/v2"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// patience bounds one step of a test on a busy machine.
const patience = 10 * time.Minute

// machine is a simulated machine with kleidi on it. It can be reset to an earlier
// state, including disk and TPM.
type machine struct {
	*tpmtest.Machine
	t      testing.TB
	name   string // of the node
	binary string
	more   string // of the configuration
	// approve, if set, has another node approve this machine, and returns the command by
	// which it joins.
	approve func() string
}

func newMachine(t testing.TB) *machine {
	t.Helper()
	dir, err := os.MkdirTemp("", "kill") // sockets need a short path
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return &machine{Machine: tpmtest.Attach(t, dir), t: t, name: "one", binary: node.Binary(t)}
}

func (m *machine) path(name string) string { return filepath.Join(m.Dir(), name) }
func (m *machine) stateDir() string        { return m.path("state") }

func (m *machine) write(name, content string) {
	m.t.Helper()
	if err := os.WriteFile(m.path(name), []byte(content), 0o600); err != nil {
		m.t.Fatal(err)
	}
}

// configure writes the configuration, which contains the folder's path.
func (m *machine) configure(more string) {
	m.t.Helper()
	m.more = more
	m.write("config.yaml", fmt.Sprintf(`apiVersion: kleidi.beezy.dev/v1alpha1
kind: KleidiConfiguration
node: %s
tpm: {device: %q, eventLog: %q}
state: {dir: %q}
kms: {socket: %q}
admin: {socket: %q}
http: {socket: ""}
%s`, m.name, m.Device(), m.EventLog(), m.stateDir(), m.path("kms.sock"), m.path("admin.sock"), more))
}

// exec runs a program other than kleidi.
func (m *machine) exec(name string, args ...string) {
	m.t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		m.t.Fatalf("%s: %v\n%s", name, err, out)
	}
}

// cluster is the ID of the keyring's cluster.
func (m *machine) cluster() string {
	m.t.Helper()
	var shown struct{ ClusterID string }
	if err := json.Unmarshal(m.run("keyring show -o json"), &shown); err != nil || shown.ClusterID == "" {
		m.t.Fatalf("no cluster ID: %v", err)
	}
	return shown.ClusterID
}

// undefine removes an NV index.
func (m *machine) undefine(index uint32) {
	m.t.Helper()
	m.Reboot(usual)
	err := m.TPM().Do(m.t.Context(), func(t transport.TPM) error {
		public, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(index)}.Execute(t)
		if err != nil {
			return err
		}
		_, err = tpm2.NVUndefineSpace{
			AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Name: tpm2.HandleName(tpm2.TPMRHOwner), Auth: tpm2.PasswordAuth(nil)},
			NVIndex:    tpm2.NamedHandle{Handle: tpm2.TPMHandle(index), Name: public.NVName},
		}.Execute(t)
		return err
	})
	if err != nil {
		m.t.Fatal(err)
	}
}

// keepEK stores the TPM's endorsement key in the TPM, where a manufacturer puts it. A TPM
// without the stored key makes the key again for each slot: in swtpm, most of the work of
// a verb.
func (m *machine) keepEK() {
	m.t.Helper()
	err := m.TPM().Do(m.t.Context(), func(t transport.TPM) error {
		ek, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHEndorsement, InPublic: tpm2.New2B(tpm2.RSAEKTemplate)}.Execute(t)
		if err != nil {
			return err
		}
		defer keys.Flush(t, ek.ObjectHandle)
		_, err = tpm2.EvictControl{Auth: tpm2.TPMRHOwner, ObjectHandle: &tpm2.NamedHandle{Handle: ek.ObjectHandle, Name: ek.Name}, PersistentHandle: 0x81010001}.Execute(t)
		return err
	})
	if err != nil {
		m.t.Fatal(err)
	}
}

// command returns a kleidi command such as `keyring verify`; DIR stands for the
// machine's folder.
func (m *machine) command(verb string) *exec.Cmd {
	return m.commandUntil(context.Background(), verb)
}

func (m *machine) commandUntil(ctx context.Context, verb string) *exec.Cmd {
	args := strings.Fields(strings.ReplaceAll(verb, "DIR", m.Dir()))
	return exec.CommandContext(ctx, m.binary, append(args, "--config", m.path("config.yaml"))...)
}

func (m *machine) try(verb string) ([]byte, error) {
	return m.tryUntil(context.Background(), verb)
}

// tryUntil runs a verb, and ends it with ctx.
func (m *machine) tryUntil(ctx context.Context, verb string) ([]byte, error) {
	var stderr bytes.Buffer
	cmd := m.commandUntil(ctx, verb)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && strings.HasPrefix(verb, "status") && exit.ExitCode() > 2 {
		return out, nil // the exit code repeats the state that the output shows
	}
	if err != nil {
		err = fmt.Errorf("kleidi %s: %w\n%s%s", verb, err, out, stderr.Bytes())
	}
	return out, err
}

func (m *machine) run(verb string) []byte {
	m.t.Helper()
	out, err := m.try(verb)
	if err != nil {
		m.t.Fatal(err)
	}
	return out
}

// snapshot is a machine that is off: the content of its files by path.
type snapshot struct {
	boot  simboot.Boot
	files map[string][]byte
}

// off switches the machine off and takes a snapshot. A restored snapshot boots b.
func (m *machine) off(b simboot.Boot) snapshot {
	m.t.Helper()
	if err := m.PowerOff(); err != nil {
		m.t.Fatal(err)
	}
	return snapshot{b, m.files("")}
}

// files reads the regular files below a folder of the machine.
func (m *machine) files(sub string) map[string][]byte {
	m.t.Helper()
	files := map[string][]byte{}
	root := os.DirFS(m.path(sub))
	err := fs.WalkDir(root, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		files[name], err = fs.ReadFile(root, name)
		return err
	})
	if err != nil {
		m.t.Fatal(err)
	}
	return files
}

// restore replaces the whole state of the machine by s, and boots it.
func (m *machine) restore(s snapshot) {
	m.t.Helper()
	if err := m.PowerOff(); err != nil {
		m.t.Fatal(err)
	}
	entries, err := os.ReadDir(m.Dir())
	if err != nil {
		m.t.Fatal(err)
	}
	for _, e := range entries {
		if err := os.RemoveAll(m.path(e.Name())); err != nil {
			m.t.Fatal(err)
		}
	}
	for name, content := range s.files {
		if err := os.MkdirAll(filepath.Dir(m.path(name)), 0o700); err != nil {
			m.t.Fatal(err)
		}
		m.write(name, string(content))
	}
	if err := os.MkdirAll(m.path("tpm"), 0o700); err != nil {
		m.t.Fatal(err)
	}
	m.configure(m.more)
	m.Reboot(s.boot)
}

// shown is the part of `kleidi keyring show -o json` that the tests read.
type shown struct {
	Revision uint64
	Current  struct{ KeyID string }
	Retired  []struct{ KeyID string }
}

func (m *machine) show() (s shown) {
	m.t.Helper()
	if err := json.Unmarshal(m.run("keyring show -o json"), &s); err != nil {
		m.t.Fatal(err)
	}
	return s
}

// ids returns the key IDs in the keyring.
func (s shown) ids() []string {
	ids := []string{s.Current.KeyID}
	for _, r := range s.Retired {
		ids = append(ids, r.KeyID)
	}
	return ids
}

// status is the part of `kleidi status -o json` that the tests read.
type status struct {
	State        string
	CurrentKeyID string
	Problem      *struct{ Cause, Message string }
}

func (m *machine) status() (s status) {
	m.t.Helper()
	if err := json.Unmarshal(m.run("status -o json"), &s); err != nil {
		m.t.Fatal(err)
	}
	return s
}

// stored is the encrypted DEK seed that kube-apiserver keeps beside an object.
type stored struct {
	id         string
	ciphertext []byte
	seed       []byte
}

// history is everything that kube-apiserver was told; it outlives kleidi's process.
type history struct {
	mu        sync.Mutex
	announced []string          // key IDs in the order of their announcement
	kept      map[string]stored // by key ID: the last seed encrypted under it
}

func newHistory() *history { return &history{kept: map[string]stored{}} }

func (h *history) clone() *history {
	h.mu.Lock()
	defer h.mu.Unlock()
	return &history{announced: slices.Clone(h.announced), kept: maps.Clone(h.kept)}
}

func (h *history) saw(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if n := len(h.announced); n == 0 || h.announced[n-1] != id {
		h.announced = append(h.announced, id)
	}
}

func (h *history) keep(s stored) {
	h.saw(s.id)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.kept[s.id] = s
}

// client behaves like kube-apiserver.
type client struct {
	kms  kmsapi.KeyManagementServiceClient
	conn *grpc.ClientConn
	*history
}

func (m *machine) client(h *history) *client {
	m.t.Helper()
	quick := backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.2, MaxDelay: 200 * time.Millisecond}
	conn, err := grpc.NewClient("unix:"+m.path("kms.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: quick, MinConnectTimeout: 20 * time.Second}))
	if err != nil {
		m.t.Fatal(err)
	}
	return &client{kmsapi.NewKeyManagementServiceClient(conn), conn, h}
}

// poll asks for the status, and encrypts a seed.
func (c *client) poll(ctx context.Context) error {
	s, err := c.kms.Status(ctx, &kmsapi.StatusRequest{}, grpc.WaitForReady(true))
	if err != nil {
		return err
	}
	c.saw(s.KeyId)
	seed := make([]byte, 32)
	rand.Read(seed)
	e, err := c.kms.Encrypt(ctx, &kmsapi.EncryptRequest{Uid: "kill", Plaintext: seed})
	if err == nil {
		c.keep(stored{e.KeyId, e.Ciphertext, seed})
	}
	return err
}

// decrypts proves that kleidi forgot nothing that it announced, and that no key ID came
// back after another one had replaced it.
func (c *client) decrypts(ctx context.Context) error {
	h := c.history.clone()
	for i, id := range h.announced {
		if slices.Contains(h.announced[:i], id) {
			return fmt.Errorf("key ID %s was announced again after another: %v", id, h.announced)
		}
	}
	for _, s := range h.kept {
		d, err := c.kms.Decrypt(ctx, &kmsapi.DecryptRequest{Uid: "kill", KeyId: s.id, Ciphertext: s.ciphertext})
		if err != nil {
			return fmt.Errorf("a seed of key ID %s: %w", s.id, err)
		}
		if !bytes.Equal(d.Plaintext, s.seed) {
			return fmt.Errorf("a seed of key ID %s decrypts to another", s.id)
		}
	}
	return nil
}

// serving runs serve, then f. Afterwards everything must decrypt.
func (m *machine) serving(h *history, f func()) {
	m.t.Helper()
	p := release(m.t, m.path("serve.log"), m.command("serve"))
	c := m.client(h)
	defer c.conn.Close()
	m.waitOpen(c, p)
	f()
	p.signal(unix.SIGTERM)
	if !p.wait() {
		m.t.Errorf("kleidi serve: %s", p.said())
	}
}

// waitOpen returns when serve has announced a key ID and decrypts all seeds.
func (m *machine) waitOpen(c *client, p *traced) {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(m.t.Context(), patience)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for err := c.poll(ctx); err != nil; err = c.poll(ctx) {
		if err := p.alive(); err != nil {
			m.t.Fatal(err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			m.t.Fatalf("kleidi serve does not open: %v\n%s", err, p.said())
		}
	}
	if err := c.decrypts(ctx); err != nil {
		m.t.Fatal(err)
	}
	m.waitAdmin(p)
}

// waitAdmin returns when the admin socket answers. Without the socket, a command would
// take the lock itself.
func (m *machine) waitAdmin(p *traced) {
	m.t.Helper()
	eventually(m.t, "serve answers on its admin socket", func() error {
		if err := p.alive(); err != nil {
			m.t.Fatal(err)
		}
		conn, err := net.Dial("unix", m.path("admin.sock"))
		if err == nil {
			conn.Close()
		}
		return err
	})
}

// identity makes the recovery identity in DIR/recovery.txt and returns its recipient.
func (m *machine) identity() string {
	m.t.Helper()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		m.t.Fatal(err)
	}
	m.write("recovery.txt", id.String()+"\n")
	return id.Recipient().String()
}
