package leaks

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	kmsapi "k8s.io/kms/apis/v2"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// patience bounds one step on a busy machine.
const patience = 3 * time.Minute

// life is a machine with kleidi on it, all output of kleidi, and the secrets that the
// output must not contain.
type life struct {
	*tpmtest.Machine
	t        *testing.T
	proxy    *tpmtest.Proxy
	http     string
	identity string
	secrets  secrets
	said     bytes.Buffer // all output except serve's
	serve    *exec.Cmd
	ended    chan error
	kms      kmsapi.KeyManagementServiceClient
}

// begin makes a machine whose TPM is behind a proxy, and runs init on it, which prints
// an identity.
func begin(t *testing.T) *life {
	t.Helper()
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	l := &life{Machine: m, t: t, proxy: tpmtest.NewProxy(t, m), http: "127.0.0.1:" + node.FreePort(t)}
	l.write("config.yaml", fmt.Sprintf(`apiVersion: kleidi.beezy.dev/v1alpha1
kind: KleidiConfiguration
node: one
tpm: {device: %q, eventLog: %q, timeout: 1m}
state: {dir: %q}
kms: {socket: %q}
admin: {socket: %q}
http: {socket: "", address: %q}
log: {level: debug}
`, l.proxy.Address(), m.EventLog(), l.path("state"), l.path("kms.sock"), l.path("admin.sock"), l.http))
	l.init()
	l.know("at first")
	return l
}

func (l *life) path(name string) string { return filepath.Join(l.Dir(), name) }

func (l *life) write(name, content string) {
	l.t.Helper()
	if err := os.WriteFile(l.path(name), []byte(content), 0o600); err != nil {
		l.t.Fatal(err)
	}
}

func (l *life) command(args ...string) *exec.Cmd {
	return exec.Command(node.Binary(l.t), append(args, "--config", l.path("config.yaml"), "--log-level", "debug")...)
}

// init types the identity that init prints. Only that one line of output may hold it.
func (l *life) init() {
	l.t.Helper()
	cmd := l.command("init")
	var stderr bytes.Buffer // os/exec writes to it beside this goroutine
	cmd.Stderr = &stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		l.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		l.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		l.t.Fatal(err)
	}
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		line := strings.TrimSpace(lines.Text())
		if l.identity == "" && strings.HasPrefix(line, "AGE-SECRET-KEY-1") {
			l.identity = line
			l.processInfo(cmd.Process.Pid)
			fmt.Fprintln(in, "AGE-SECRET-KEY-1NOTTHISONE")
			fmt.Fprintln(in, line)
			continue
		}
		fmt.Fprintln(&l.said, line)
	}
	err = cmd.Wait()
	l.said.Write(stderr.Bytes())
	if err != nil {
		l.t.Fatalf("init: %v\n%s", err, l.said.Bytes())
	}
	l.secrets.addIdentity(l.identity)
	l.write("recovery.txt", l.identity+"\n")
}

// know adds the present KEK to the secrets to look for.
func (l *life) know(when string) {
	l.t.Helper()
	l.secrets.addKEK(l.t, when, l.path("state/keyring.json"), l.identity)
}

// processInfo records what ps and /proc show of a process.
func (l *life) processInfo(pid int) {
	l.t.Helper()
	for _, name := range []string{"environ", "cmdline", "comm", "status", "limits", "maps"} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
		if err != nil {
			l.t.Fatal(err)
		}
		l.said.Write(b)
	}
}

// try runs a verb, and keeps its output for the search at the end.
func (l *life) try(args ...string) error {
	out, err := l.command(args...).CombinedOutput()
	l.said.Write(out)
	if err != nil {
		err = fmt.Errorf("kleidi %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return err
}

func (l *life) run(args ...string) {
	l.t.Helper()
	if err := l.try(args...); err != nil {
		l.t.Fatal(err)
	}
}

// start runs serve, with more variables in its environment.
func (l *life) start(more ...string) {
	l.t.Helper()
	log, err := os.OpenFile(l.path("serve.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		l.t.Fatal(err)
	}
	defer log.Close()
	l.serve = l.command("serve")
	l.serve.Env = append(os.Environ(), more...)
	l.serve.Dir = l.Dir()
	l.serve.Stdout, l.serve.Stderr = log, log
	if err := l.serve.Start(); err != nil {
		l.t.Fatal(err)
	}
	// The fields belong to the next serve before this goroutine has closed its channel.
	serve, ended := l.serve, make(chan error, 1)
	l.ended = ended
	go func() { ended <- serve.Wait(); close(ended) }()
	l.t.Cleanup(func() { _ = serve.Process.Kill(); <-ended })
	conn, err := grpc.NewClient("unix:"+l.path("kms.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { conn.Close() })
	l.kms = kmsapi.NewKeyManagementServiceClient(conn)
}

// log returns serve's log.
func (l *life) log() []byte {
	l.t.Helper()
	b, err := os.ReadFile(l.path("serve.log"))
	if err != nil {
		l.t.Fatal(err)
	}
	return b
}

// stop ends serve.
func (l *life) stop(s syscall.Signal) error {
	_ = l.serve.Process.Signal(s)
	return <-l.ended
}

// eventually repeats ready until it returns nil.
func (l *life) eventually(what string, ready func() error) {
	l.t.Helper()
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for err := ready(); err != nil; err = ready() {
		select {
		case <-tick.C:
		case <-deadline.C:
			l.t.Fatalf("%s: not within %s: %v\n%s", what, patience, err, l.log())
		}
	}
}

func (l *life) waitOpen() {
	l.t.Helper()
	l.eventually("serve is open", func() error {
		code, body, err := l.get("/readyz")
		if err == nil && code != http.StatusOK {
			err = fmt.Errorf("%s", body)
		}
		return err
	})
}

func (l *life) get(path string) (int, []byte, error) {
	res, err := http.Get("http://" + l.http + path)
	if err != nil {
		return 0, nil, err
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	l.said.Write(b)
	return res.StatusCode, b, err
}

// seed encrypts and decrypts a DEK seed, and adds the seed to the secrets to look for.
func (l *life) seed(name string) error {
	ctx, cancel := context.WithTimeout(l.t.Context(), patience)
	defer cancel()
	seed := make([]byte, 32)
	rand.Read(seed)
	e, err := l.kms.Encrypt(ctx, &kmsapi.EncryptRequest{Uid: "leaks", Plaintext: seed}, grpc.WaitForReady(true))
	if err != nil {
		return err
	}
	l.said.Write(e.Ciphertext)
	for _, annotation := range e.Annotations {
		l.said.Write(annotation)
	}
	d, err := l.kms.Decrypt(ctx, &kmsapi.DecryptRequest{Uid: "leaks", Ciphertext: e.Ciphertext, KeyId: e.KeyId})
	if err == nil && !bytes.Equal(d.Plaintext, seed) {
		err = fmt.Errorf("a seed decrypts to another")
	}
	if name != "" {
		l.secrets.add("DEK seed "+name, seed)
		e.Ciphertext[len(e.Ciphertext)-1] ^= 1
		_, refused := l.kms.Decrypt(ctx, &kmsapi.DecryptRequest{Uid: "leaks", Ciphertext: e.Ciphertext, KeyId: e.KeyId})
		fmt.Fprintln(&l.said, refused)
		// An operator's mistake: the seed in place of the ciphertext, then in place of
		// the key ID.
		_, refused = l.kms.Decrypt(ctx, &kmsapi.DecryptRequest{Uid: "leaks", Ciphertext: seed, KeyId: e.KeyId})
		fmt.Fprintln(&l.said, refused)
	}
	return err
}

// admin sends a body to the admin socket, as another CLI might.
func (l *life) admin(verb string, body []byte) {
	l.t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", l.path("admin.sock"))
	}}}
	res, err := client.Post("http://kleidi/v1/"+verb, "application/json", bytes.NewReader(body))
	if err != nil {
		l.t.Fatal(err)
	}
	defer res.Body.Close()
	if _, err := io.Copy(&l.said, res.Body); err != nil {
		l.t.Fatal(err)
	}
}

// look asks for all of kleidi's reports.
func (l *life) look() {
	l.t.Helper()
	for _, path := range []string{"/metrics", "/readyz", "/livez"} {
		if _, _, err := l.get(path); err != nil {
			l.t.Fatal(err)
		}
	}
	for _, args := range []string{"status -o json", "status", "keyring show -o json", "keyring show"} {
		l.run(strings.Fields(args)...)
	}
	for _, verb := range []string{"status", "verify", "reload"} {
		l.admin(verb, []byte("{}"))
	}
	l.processInfo(l.serve.Process.Pid)
}

// quoted returns the JSON string in which the admin socket carries b.
func quoted(t *testing.T, b []byte) []byte {
	t.Helper()
	out, err := json.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// silent searches everything that was printed, logged or stored.
func (l *life) silent() {
	l.t.Helper()
	l.said.Write(l.log())
	for _, name := range []string{"keyring.json", "keyring.json.previous", "anchor.json", "anchor.json.previous", "lock"} {
		b, err := os.ReadFile(l.path("state/" + name))
		if err != nil {
			l.t.Fatal(err)
		}
		fmt.Fprintf(&l.said, "%s: %s\n", name, b)
		var stored struct{ Body []byte }
		if json.Unmarshal(b, &stored) == nil {
			l.said.Write(stored.Body) // base64 in the file
		}
	}
	for _, name := range l.secrets.in(l.said.Bytes()) {
		l.t.Errorf("%s was said", name)
	}
}
