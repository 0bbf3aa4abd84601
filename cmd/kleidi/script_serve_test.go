package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	kmsapi "k8s.io/kms/apis/v2"
)

// process is a running serve.
type process struct {
	cmd   *exec.Cmd
	began time.Time
	log   lockedBuffer
	seen  int // the part of the log that waitfor has already read
	ended chan struct{}
	err   error
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(b)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	<-p.ended
}

func (p *process) running() bool {
	select {
	case <-p.ended:
		return false
	default:
		return true
	}
}

// serve starts kleidi serve: "serve -modest" as a root user that file modes bind, "serve
// -unit" with the rights that the systemd unit leaves, and "serve -second" beside the
// first one. Later commands are then about the second.
func (h *host) serve(ts *testscript.TestScript, args []string) error {
	if len(args) > 0 && args[0] == "-second" {
		args = args[1:]
		h.first, h.server = h.server, nil
		h.address = ts.Getenv("SECOND")
	}
	if h.server != nil && h.server.running() {
		return broken("serve runs already")
	}
	argv := []string{binary, "--config", h.path("config.yaml"), "serve"}
	if len(args) > 0 && args[0] == "-modest" {
		args = args[1:]
		if os.Geteuid() == 0 {
			argv = append([]string{"setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"}, argv...)
		}
	}
	if len(args) > 0 && args[0] == "-unit" {
		args = args[1:]
		argv = append(confinement(h.t), argv...)
	}
	p := &process{cmd: exec.Command(argv[0], append(argv[1:], args...)...), began: time.Now(), ended: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = &p.log, &p.log
	if conf := ts.Getenv("SOFTHSM2_CONF"); conf != "" {
		p.cmd.Env = append(os.Environ(), "SOFTHSM2_CONF="+conf)
	}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := p.cmd.Start(); err != nil {
		return broken("%w", err)
	}
	go func() { p.err = p.cmd.Wait(); close(p.ended) }()
	h.server = p
	return nil
}

// term ends serve with SIGTERM, or the first of two. serve must have been running, and
// must end well. Its log can then be matched as stderr.
func (h *host) term(ts *testscript.TestScript, args []string) error {
	p := h.server
	if len(args) > 0 && args[0] == "-first" {
		p = h.first
	}
	if !p.running() {
		return broken("serve has died: %v\n%s", p.err, p.log.String())
	}
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.ended:
	case <-time.After(waitTimeout):
		p.kill()
		return broken("serve does not end")
	}
	fmt.Fprint(ts.Stderr(), p.log.String())
	if p.err != nil {
		return broken("serve ends in %w", p.err)
	}
	return nil
}

// crash ends serve as a crash would.
func (h *host) crash(*testscript.TestScript, []string) error {
	h.server.kill()
	return nil
}

func (h *host) hup(*testscript.TestScript, []string) error {
	return h.server.cmd.Process.Signal(syscall.SIGHUP)
}

// waitFor waits until serve is open, is locked for a reason that matches a regular
// expression, has logged a match since the last such wait, or has made a file. The
// answer of /readyz, or the log, can then be matched as stdout.
func (h *host) waitFor(ts *testscript.TestScript, args []string) error {
	want := append(args, "")[1]
	var shown string
	err := eventually(func() (err error) {
		if !h.server.running() {
			return broken("serve has died: %v\n%s", h.server.err, h.server.log.String())
		}
		switch args[0] {
		case "open", "locked":
			code, body, err := h.fetch("/readyz")
			if shown = body; err != nil {
				return err
			}
			if (code == http.StatusOK) != (args[0] == "open") || !regexp.MustCompile(want).MatchString(body) {
				return fmt.Errorf("/readyz says %d %s", code, body)
			}
			if args[0] == "locked" && want == "" && starting(body) {
				return errors.New("it is starting")
			}
			return nil
		case "file":
			_, err := os.Lstat(h.abs(want))
			return err
		case "log":
			log := h.server.log.String()
			at := regexp.MustCompile(want).FindStringIndex(log[h.server.seen:])
			if at == nil {
				return fmt.Errorf("no match in the log")
			}
			shown, h.server.seen = log[h.server.seen:], h.server.seen+at[1]
			return nil
		}
		return broken("no such condition")
	})
	if err != nil {
		return fmt.Errorf("waitfor %v: %w\n%s", args, err, h.server.log.String())
	}
	fmt.Fprint(ts.Stdout(), shown)
	return nil
}

func (h *host) fetch(path string) (int, string, error) {
	if h.address == "" { // the configuration names no port
		return fetch("kleidi", h.path("run/http.sock"), path)
	}
	return fetch(h.address, "", path)
}

// fetch sends a request to an address, or to a socket if one is given.
func fetch(address, socket, path string) (int, string, error) {
	transport := &http.Transport{DisableKeepAlives: true}
	if socket != "" {
		transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		}
	}
	client := http.Client{Timeout: waitTimeout, Transport: transport}
	r, err := client.Get("http://" + address + path)
	if err != nil {
		return 0, "", err
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	return r.StatusCode, string(b), err
}

// get PATH [SOCKET [REGEXP]] shows the answers of health and metrics, from serve or from
// another socket, once the answer matches; a code other than 200 is a failure.
func (h *host) get(ts *testscript.TestScript, args []string) error {
	var code int
	var body string
	err := eventually(func() (err error) {
		if len(args) > 1 {
			code, body, err = fetch("kleidi", h.abs(args[1]), args[0])
		} else {
			code, body, err = h.fetch(args[0])
		}
		if err == nil && len(args) > 2 && !regexp.MustCompile(args[2]).MatchString(body) {
			err = fmt.Errorf("%s does not say %s: %s", args[0], args[2], body)
		}
		return err
	})
	if err != nil {
		return err
	}
	fmt.Fprintln(ts.Stdout(), code)
	fmt.Fprint(ts.Stdout(), body)
	if code != http.StatusOK {
		return fmt.Errorf("%s answers %d", args[0], code)
	}
	return nil
}

// sealedSeed is an encrypted DEK seed.
type sealedSeed struct {
	seed, ciphertext []byte
	keyID            string
}

// kms makes kube-apiserver's calls: kms status, kms encrypt NAME, and kms decrypt NAME
// for the seed that was encrypted under that name. After kms hold, which also asks for
// the status, kms held makes the call on the same connection. kms soon makes the call as
// callSoon does.
func (h *host) kms(ts *testscript.TestScript, args []string) error {
	if args[0] == "held" {
		return h.kmsOn(ts, h.held, args[1:])
	}
	conn, err := grpc.NewClient("unix://"+h.path("run/kms.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	if err != nil {
		return broken("%w", err)
	}
	if args[0] == "hold" {
		h.held = conn
		h.t.Cleanup(func() { conn.Close() })
		return h.kmsOn(ts, conn, []string{"status"})
	}
	defer conn.Close()
	return h.kmsOn(ts, conn, args)
}

func (h *host) kmsOn(ts *testscript.TestScript, conn *grpc.ClientConn, args []string) error {
	ctx, cancel := context.WithTimeout(h.t.Context(), waitTimeout)
	defer cancel()
	call := h.call
	if args[0] == "soon" {
		call, args = h.callSoon, args[1:]
	}
	out, err := call(ctx, kmsapi.NewKeyManagementServiceClient(conn), args)
	if ctx.Err() != nil {
		return broken("no answer: %w", err)
	}
	if err != nil {
		fmt.Fprintln(ts.Stderr(), err)
	}
	fmt.Fprint(ts.Stdout(), out)
	return err
}

// callSoon makes a call that has to wait for the first attempt to unlock. serve lets a call
// wait for 2 s at most. On a busy machine the attempt may take longer; only then is the call
// made again, as kube-apiserver would do.
func (h *host) callSoon(ctx context.Context, client kmsapi.KeyManagementServiceClient, args []string) (out string, err error) {
	starting := func(said string) bool { return strings.Contains(said, "the first attempt to unlock has not ended") }
	err = whileBusy(starting, func() error {
		out, err = h.call(ctx, client, args)
		if err != nil && starting(err.Error()) && time.Since(h.server.began) < 2*time.Second {
			return broken("serve did not wait for the first attempt: %w", err)
		}
		return err
	})
	return out, err
}

func (h *host) call(ctx context.Context, client kmsapi.KeyManagementServiceClient, args []string) (string, error) {
	switch args[0] {
	case "status":
		s, err := client.Status(ctx, &kmsapi.StatusRequest{})
		return fmt.Sprintln(s.GetVersion(), s.GetHealthz(), s.GetKeyId()), err
	case "encrypt":
		seed := make([]byte, 32)
		rand.Read(seed)
		r, err := client.Encrypt(ctx, &kmsapi.EncryptRequest{Uid: args[1], Plaintext: seed})
		if err == nil {
			h.sealed[args[1]] = sealedSeed{seed, r.Ciphertext, r.KeyId}
		}
		return fmt.Sprintln(r.GetKeyId()), err
	case "decrypt":
		s, ok := h.sealed[args[1]]
		if !ok {
			return "", broken("nothing was encrypted as %s", args[1])
		}
		r, err := client.Decrypt(ctx, &kmsapi.DecryptRequest{Uid: args[1], KeyId: s.keyID, Ciphertext: s.ciphertext})
		if err == nil && !bytes.Equal(r.Plaintext, s.seed) {
			return "", broken("decrypted something else")
		}
		return "", err
	}
	return "", broken("kms %s: no such call", args[0])
}
