package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	kms "k8s.io/kms/apis/v2"

	"github.com/beezy-dev/kleidi/e2e/measuredboot/guest/wire"
)

const (
	socket  = "unix:///run/kleidi/kms.sock"
	logFile = "/run/serve.log"
	// patience bounds one step; the machine is emulated, on a host that may be busy.
	patience = 5 * time.Minute
)

// serving is a running kleidi serve. If cmd is nil, it is a unit of systemd.
type serving struct {
	cmd   *exec.Cmd
	ended chan error
}

// systemd reports whether systemd runs this machine.
func systemd() bool {
	_, err := os.Stat("/run/systemd/system")
	return err == nil
}

const unit = "kleidi.service"

func start(flags []string) (*serving, error) {
	s := &serving{ended: make(chan error, 1)}
	if systemd() {
		r := wire.Result{}
		if err := command([]string{"systemctl", "start", unit}, &r); err != nil {
			return nil, fmt.Errorf("systemctl start %s: %w: %s", unit, err, r.Stderr)
		}
		return s, nil
	}
	if err := os.MkdirAll("/run/kleidi", 0o700); err != nil {
		return nil, err
	}
	log, err := os.OpenFile(logFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	s.cmd = exec.Command(wire.Kleidi, append([]string{"serve"}, flags...)...)
	s.cmd.Stdout, s.cmd.Stderr = log, log
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { s.ended <- s.cmd.Wait() }()
	return s, nil
}

// command runs a program to its end.
func command(line []string, r *wire.Result) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, line[0], line[1:]...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	r.Stdout, r.Stderr = stdout.String(), stderr.String()
	return err
}

// serve starts kleidi serve, waits until kleidi has tried to open the keyring, and asks
// for the result through KMS v2 and with kleidi status.
func (m *machine) serve(config string, r *wire.Result) error {
	if m.serving != nil {
		return errors.New("kleidi serve runs already")
	}
	var flags []string
	if config != "" {
		flags = []string{"--config", config}
	}
	s, err := start(flags)
	if err != nil {
		return err
	}
	m.serving = s
	tried := s.tried(r)
	status := wire.Result{}
	err = command(append([]string{wire.Kleidi, "status", "-o", "json"}, flags...), &status)
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() > 2 { // locked, or a problem: what it shows
		err = nil
	}
	if err != nil {
		return errors.Join(tried, fmt.Errorf("kleidi status: %w: %s", err, status.Stderr))
	}
	r.Status = status.Stdout
	return tried
}

// tried returns the answer of KMS v2 Status after the first attempt to unlock.
func (s *serving) tried(r *wire.Result) error {
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		err := kmsStatus(r)
		if err == nil || !early(err) {
			return err
		}
		select {
		case ended := <-s.ended:
			s.ended <- ended
			return fmt.Errorf("kleidi serve ended: %v", ended)
		case <-deadline.C:
			return err
		case <-tick.C:
		}
	}
}

// early reports whether kleidi was asked before it listened, or before its first attempt.
func early(err error) bool {
	s := err.Error()
	return strings.Contains(s, "connection error") || strings.Contains(s, "first attempt to unlock has not ended")
}

// stop ends kleidi serve and returns its log.
func (m *machine) stop() string {
	if m.serving == nil {
		return ""
	}
	m.serving.stop()
	m.serving = nil
	log, err := os.ReadFile(logFile)
	if err != nil {
		return err.Error()
	}
	return string(log)
}

func (s *serving) stop() {
	if s.cmd == nil {
		_ = command([]string{"systemctl", "stop", unit}, &wire.Result{}) // the log is examined afterwards
		return
	}
	_ = s.cmd.Process.Signal(unix.SIGTERM) // an error means that kleidi has ended, as intended
	select {
	case <-s.ended:
	case <-time.After(patience):
		_ = s.cmd.Process.Kill()
		<-s.ended
	}
}

// withKMS calls kleidi as kube-apiserver does.
func withKMS(call func(context.Context, kms.KeyManagementServiceClient) error) error {
	conn, err := grpc.NewClient(socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"))
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return call(ctx, kms.NewKeyManagementServiceClient(conn))
}

func kmsStatus(r *wire.Result) error {
	return withKMS(func(ctx context.Context, c kms.KeyManagementServiceClient) error {
		status, err := c.Status(ctx, &kms.StatusRequest{})
		if err == nil {
			r.Healthz, r.KeyID = status.Healthz, status.KeyId
		}
		return err
	})
}

func encrypt(plain []byte, r *wire.Result) error {
	return withKMS(func(ctx context.Context, c kms.KeyManagementServiceClient) error {
		res, err := c.Encrypt(ctx, &kms.EncryptRequest{Uid: "seed", Plaintext: plain})
		if err == nil {
			r.Sealed = &wire.Sealed{KeyID: res.KeyId, Ciphertext: res.Ciphertext, Annotations: res.Annotations}
		}
		return err
	})
}

func decrypt(s *wire.Sealed, r *wire.Result) error {
	return withKMS(func(ctx context.Context, c kms.KeyManagementServiceClient) error {
		res, err := c.Decrypt(ctx, &kms.DecryptRequest{Uid: "seed", Ciphertext: s.Ciphertext, KeyId: s.KeyID, Annotations: s.Annotations})
		if err == nil {
			r.Plain = res.Plaintext
		}
		return err
	})
}
