package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/term"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	kmsapi "k8s.io/kms/apis/v2"
)

// run runs a kleidi command.
func (d *demo) run(ctx context.Context, args ...string) (string, error) {
	fmt.Printf("   %s\n", dim("$ kleidi "+shorten(args)))
	var errOut bytes.Buffer
	cmd := exec.CommandContext(ctx, d.kleidi, append(args, "--config", d.path("config.yaml"))...)
	cmd.Stderr = &errOut
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("kleidi %s: %w\n%s", args[0], err, errOut.Bytes())
	}
	return string(out), nil
}

// shorten leaves out flags that only the demo needs.
func shorten(args []string) string {
	s := make([]string, len(args))
	for i, a := range args {
		switch {
		case strings.HasPrefix(a, "age1"):
			a = a[:12] + "…"
		case strings.HasPrefix(a, "/"):
			a = "…/" + a[strings.LastIndexByte(a, '/')+1:]
		}
		s[i] = a
	}
	return strings.Join(s, " ")
}

// server is a running kleidi serve and a client of its socket.
type server struct {
	cmd    *exec.Cmd
	conn   *grpc.ClientConn
	client kmsapi.KeyManagementServiceClient
}

func startServer(d *demo) (*server, error) {
	log, err := os.OpenFile(d.path("kleidi.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	conn, err := grpc.NewClient("unix://"+d.path("kms.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)),
		// the socket appears within milliseconds; gRPC would try again only after a
		// second
		grpc.WithConnectParams(grpc.ConnectParams{MinConnectTimeout: 5 * time.Second, Backoff: backoff.Config{BaseDelay: 2 * time.Millisecond, Multiplier: 1, MaxDelay: 2 * time.Millisecond}}))
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(d.kleidi, "serve", "--config", d.path("config.yaml"))
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return &server{cmd: cmd, conn: conn, client: kmsapi.NewKeyManagementServiceClient(conn)}, nil
}

// stop ends kleidi in the orderly way. It does nothing for a nil or a stopped server.
func (s *server) stop() {
	if s == nil || s.cmd.ProcessState != nil {
		return
	}
	_ = s.conn.Close()
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	_ = s.cmd.Wait()
}

func (s *server) status(ctx context.Context) (*kmsapi.StatusResponse, error) {
	return s.client.Status(ctx, &kmsapi.StatusRequest{})
}

// sealed is a DEK seed and its encrypted form.
type sealed struct {
	seed, ciphertext []byte
	keyID            string
	annotations      map[string][]byte
}

func (s *server) encrypt(ctx context.Context, seed []byte) (sealed, error) {
	r, err := s.client.Encrypt(ctx, &kmsapi.EncryptRequest{Uid: "demo", Plaintext: seed})
	if err != nil {
		return sealed{}, err
	}
	return sealed{seed: seed, ciphertext: r.Ciphertext, keyID: r.KeyId, annotations: r.Annotations}, nil
}

func (s *server) decrypt(ctx context.Context, c sealed) ([]byte, error) {
	r, err := s.client.Decrypt(ctx, &kmsapi.DecryptRequest{Uid: "demo", Ciphertext: c.ciphertext, KeyId: c.keyID, Annotations: c.annotations})
	if err != nil {
		return nil, err
	}
	return r.Plaintext, nil
}

func say(format string, args ...any) { fmt.Printf("   "+format+"\n", args...) }

func show(out string) {
	for line := range strings.Lines(strings.TrimSpace(out) + "\n") {
		fmt.Print("     " + line)
	}
}

var colours = term.IsTerminal(int(os.Stdout.Fd())) && os.Getenv("NO_COLOR") == ""

func paint(code, s string) string {
	if !colours {
		return s
	}
	return "\x1b[" + code + "m" + s + "\x1b[0m"
}

func bold(s string) string { return paint("1", s) }
func dim(s string) string  { return paint("2", s) }
func red(s string) string  { return paint("31", s) }
func tick() string         { return paint("32", "✓") }
