package admin_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/seal"
)

// asClient makes the test binary call Status on the named socket.
const asClient = "KLEIDI_TEST_ADMIN_CLIENT"

// asImpostor makes the test binary listen on the named socket in kleidi's place.
const asImpostor = "KLEIDI_TEST_ADMIN_IMPOSTOR"

func TestMain(m *testing.M) {
	if path := os.Getenv(asImpostor); path != "" {
		fmt.Println(impersonate(path))
		os.Exit(0)
	}
	if path := os.Getenv(asClient); path != "" {
		c, err := admin.Dial(context.Background(), path)
		if err == nil {
			_, err = admin.Call(context.Background(), c, admin.Status, admin.StatusRequest{})
		}
		fmt.Println(err)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

type fixture struct {
	*admin.Server
	path string
	log  *bytes.Buffer // read after the call: the handler logs before it answers
}

func start(t *testing.T) *fixture {
	t.Helper()
	dir, err := os.MkdirTemp("", "kleidi")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	f := &fixture{path: filepath.Join(dir, "admin.sock"), log: &bytes.Buffer{}}
	log := slog.New(slog.NewJSONHandler(f.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	l, err := admin.Listen(f.path, log)
	if err != nil {
		t.Fatal(err)
	}
	f.Server = admin.NewServer(admin.Options{Log: log})
	done := make(chan error, 1)
	go func() { done <- f.Serve(l) }()
	t.Cleanup(func() {
		if err := f.Shutdown(context.Background()); err != nil {
			t.Error(err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return f
}

func (f *fixture) dial(t *testing.T) *admin.Client {
	t.Helper()
	c, err := admin.Dial(t.Context(), f.path)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestStatusCrossesWhole(t *testing.T) {
	f, no := start(t), false
	now := time.Date(2026, 11, 21, 1, 2, 3, 0, time.UTC)
	problem := &admin.Problem{Cause: seal.CauseEpoch, Message: "epoch 3 has passed", Hint: "run kleidi reseal"}
	want := admin.StatusReport{
		Version: "v1", Node: "cp-1", State: admin.Locked, Since: now, Problem: problem, NextAttempt: now,
		ClusterID: "00112233445566778899aabbccddeeff", CurrentKeyID: "k1-a", Revision: 7,
		Keys:        []admin.KeyReport{{KeyID: "k1-a", Role: "current", Created: now}, {KeyID: "k1-z", Role: "retired", Retired: now}},
		Slots:       []admin.SlotReport{{Type: "tpm", Node: "cp-1", Binding: "PCRs 4, 7, 11", Opens: &no, Problem: problem}},
		Attestation: &admin.AttestationReport{Passed: true, Time: now, Boot: "uki", Bank: "SHA-256", PCRs: []int{4, 7, 11}},
		Memory:      "memfd_secret",
	}
	admin.Handle(f.Server, admin.Status, func(_ context.Context, r admin.StatusRequest) (admin.StatusReport, error) {
		if r.Try != admin.TryAll {
			return admin.StatusReport{}, errors.New("try is lost")
		}
		return want, nil
	})
	got, err := admin.Call(t.Context(), f.dial(t), admin.Status, admin.StatusRequest{Try: admin.TryAll})
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v\ngot  %+v\nwant %+v", err, got, want)
	}
}

func TestErrorsCrossWithCauseAndHint(t *testing.T) {
	f := start(t)
	sealed := fmt.Errorf("rotate: %w", seal.Errorf(seal.CauseLockout, "wait 10 minutes", "TPM2_Load: lockout"))
	var fail error
	admin.Handle(f.Server, admin.Rotate, func(context.Context, admin.RotateRequest) (admin.KeyringState, error) {
		return admin.KeyringState{}, fail
	})
	for _, fail = range []error{sealed, errors.New("plain"), seal.Errorf(seal.CauseStore, "", "no hint")} {
		_, err := admin.Call(t.Context(), f.dial(t), admin.Rotate, admin.RotateRequest{})
		if err == nil || err.Error() != fail.Error() || seal.CauseOf(err) != seal.CauseOf(fail) {
			t.Errorf("got %v (%s), want %v (%s)", err, seal.CauseOf(err), fail, seal.CauseOf(fail))
		}
		if e, ok := errors.AsType[*seal.Error](err); errors.Is(fail, sealed) && (!ok || e.Hint != "wait 10 minutes") {
			t.Errorf("hint of %v is lost", err)
		}
	}
}

func TestIdentityIsWipedAndNeverShown(t *testing.T) {
	const identity = "AGE-SECRET-KEY-1QQPQQQQ"
	f := start(t)
	var kept admin.Identity
	fail, panicWith := error(nil), any(nil)
	admin.Handle(f.Server, admin.Recover, func(_ context.Context, r admin.RecoverRequest) (admin.KeyringState, error) {
		if string(r.Identity) != identity {
			return admin.KeyringState{}, errors.New("another identity arrives")
		}
		kept = r.Identity
		if panicWith != nil {
			panic(panicWith)
		}
		return admin.KeyringState{CurrentKeyID: "k1-b", Former: "k1-a"}, fail
	})
	for _, tc := range []struct {
		fail   error
		panics any
	}{{nil, nil}, {errors.New("no"), nil}, {nil, identity}} {
		fail, panicWith = tc.fail, tc.panics
		_, err := admin.Call(t.Context(), f.dial(t), admin.Recover, admin.RecoverRequest{Identity: admin.Identity(identity)})
		if wantErr := tc.fail != nil || tc.panics != nil; (err != nil) != wantErr {
			t.Errorf("%+v: %v", tc, err)
		}
		if len(kept) != len(identity) || !bytes.Equal(kept, make([]byte, len(identity))) {
			t.Errorf("%+v: the identity is not wiped: %d bytes", tc, len(kept))
		}
		shown := fmt.Sprint(err) + f.log.String()
		for _, leak := range []string{identity, fmt.Sprintf("%x", identity), base64.StdEncoding.EncodeToString([]byte(identity))} {
			if strings.Contains(shown, leak) {
				t.Errorf("%+v: %q shows in %s", tc, leak, shown)
			}
		}
	}
	req := admin.RecoverRequest{Identity: admin.Identity(identity)}
	if s := fmt.Sprintf("%v %+v %#v %s", req, req, req, req.Identity); strings.Contains(s, "AGE") {
		t.Error(s)
	}
	var log bytes.Buffer
	slog.New(slog.NewTextHandler(&log, nil)).Info("m", "id", req.Identity)
	if strings.Contains(log.String(), "AGE") {
		t.Error(log.String())
	}
}

func TestNotRunning(t *testing.T) {
	dir := t.TempDir()
	if _, err := admin.Dial(t.Context(), filepath.Join(dir, "none.sock")); !errors.Is(err, admin.ErrNotRunning) {
		t.Errorf("no socket: %v", err)
	}
	if _, err := admin.Dial(t.Context(), filepath.Join(dir, "none", "admin.sock")); !errors.Is(err, admin.ErrNotRunning) {
		t.Errorf("no folder: %v", err)
	}
	stale := filepath.Join(dir, "stale.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: stale, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	if _, err := admin.Dial(t.Context(), stale); !errors.Is(err, admin.ErrNotRunning) {
		t.Errorf("stale socket: %v", err)
	}
}

func TestOtherUsersAreRefused(t *testing.T) {
	f := start(t)
	admin.Handle(f.Server, admin.Status, func(context.Context, admin.StatusRequest) (admin.StatusReport, error) {
		return admin.StatusReport{}, nil
	})
	if fi, err := os.Stat(f.path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	as := func(uid uint32) string {
		out, err := reexec(t, filepath.Dir(f.path), uid, asClient+"="+f.path).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		return strings.TrimSpace(string(out))
	}
	if got := as(1000); got != "you may not connect to "+f.path+" (admin.socket); run the command as root, or as the user of kleidi serve" {
		t.Errorf("by mode: %s", got)
	}
	if err := os.Chmod(f.path, 0o666); err != nil { // the mode is not the only protection
		t.Fatal(err)
	}
	if got := as(1000); got != "UID 1000 may not use the admin socket; run the command as root" {
		t.Errorf("by peer credentials: %s", got)
	}
	if got := as(0); got != "<nil>" {
		t.Errorf("root: %s", got)
	}
}

// reexec returns this test binary as another user runs it, from a copy in dir.
func reexec(t *testing.T, dir string, uid uint32, env string) *exec.Cmd {
	t.Helper()
	exe, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(dir, "kleidi-test")
	if err := os.WriteFile(name, exe, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(name)
	cmd.Env = append(os.Environ(), env)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	return cmd
}

// impersonate answers on path until stdin ends, and returns everything that it
// received.
func impersonate(path string) string {
	l, err := net.Listen("unix", path)
	if err == nil {
		err = os.Chmod(path, 0o777)
	}
	if err != nil {
		return err.Error()
	}
	fmt.Println("listening")
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		l.Close()
	}()
	var got []byte
	for {
		c, err := l.Accept()
		if err != nil {
			return fmt.Sprintf("got %q", got)
		}
		b := make([]byte, 4096)
		n, _ := c.Read(b)
		got = append(got, b[:n]...)
		c.Close()
	}
}

// TestImpostorsGetNothing makes another user listen where kleidi serve would. The
// command refuses, and not a byte reaches the impostor.
func TestImpostorsGetNothing(t *testing.T) {
	const uid = 1000
	folder := func(t *testing.T, path string, mode os.FileMode, owner int) string {
		t.Helper()
		if err := errors.Join(os.MkdirAll(path, 0o700), os.Chown(path, owner, 0), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
		return path
	}
	for name, tc := range map[string]struct {
		folder func(t *testing.T, base string) string
		want   string
	}{
		"sticky": {func(t *testing.T, base string) string {
			return folder(t, base+"/s", os.ModeSticky|0o777, 0)
		}, "has mode 1777"},
		"below another user's": {func(t *testing.T, base string) string {
			folder(t, base+"/u", 0o755, uid)
			return folder(t, base+"/u/kleidi", 0o755, 0)
		}, "/u belongs to UID 1000, who can replace what is below it"},
		"another user's": {func(t *testing.T, base string) string {
			return folder(t, base+"/u", 0o755, uid)
		}, "/u belongs to UID 1000"},
		"in root's own folder": {func(t *testing.T, base string) string {
			return folder(t, base+"/r", 0o755, 0)
		}, "of UID 1000 listens there instead of kleidi serve, and nothing was sent to it"},
	} {
		t.Run(name, func(t *testing.T) {
			base := folder(t, t.TempDir(), 0o755, 0)
			folder(t, filepath.Dir(base), 0o755, 0)
			made := filepath.Join(folder(t, base+"/made", 0o755, uid), "s")
			cmd := reexec(t, base, uid, asImpostor+"="+made)
			stdin, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			stdout, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer cmd.Wait()
			out := bufio.NewReader(stdout)
			if line, err := out.ReadString('\n'); line != "listening\n" {
				t.Fatalf("%q, %v", line, err)
			}
			path := filepath.Join(tc.folder(t, base), "admin.sock")
			if err := os.Rename(made, path); err != nil {
				t.Fatal(err)
			}
			c, err := admin.Dial(t.Context(), path)
			if err == nil {
				_, _ = admin.Call(t.Context(), c, admin.Recover, admin.RecoverRequest{Identity: admin.Identity("AGE-SECRET-KEY-1")})
			}
			if err == nil || errors.Is(err, admin.ErrNotRunning) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v; want %q", err, tc.want)
			}
			stdin.Close()
			if line, _ := out.ReadString('\n'); line != "got \"\"\n" {
				t.Errorf("the impostor: %s", line)
			}
		})
	}
}

func TestBadRequests(t *testing.T) {
	f := start(t)
	admin.Handle(f.Server, admin.Recover, func(context.Context, admin.RecoverRequest) (admin.KeyringState, error) {
		return admin.KeyringState{}, nil
	})
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", f.path)
	}}}
	for _, tc := range []struct {
		name, method, path, body string
		code                     int
		text                     string
	}{
		{"good", "POST", "/v1/recover", `{"identity":"QUdF"}`, 200, "currentKeyID"},
		{"unknown verb", "POST", "/v1/explode", `{}`, 404, "does not know"},
		{"verb without a handler", "POST", "/v1/rotate", `{}`, 404, "does not know"},
		{"GET", "GET", "/v1/recover", "", 404, "does not know"},
		{"empty", "POST", "/v1/recover", "", 400, "not valid JSON for this command"},
		{"not JSON", "POST", "/v1/recover", "AGE-SECRET", 400, "not valid JSON for this command"},
		{"wrong type", "POST", "/v1/recover", `{"identity":["AGE-SECRET"]}`, 400, "not valid JSON for this command"},
		{"unknown field", "POST", "/v1/recover", `{"identity":"QUdF","dryRun":true}`, 400, "dryRun"},
		{"duplicate field", "POST", "/v1/recover", `{"identity":"QUdF","identity":"QUdF"}`, 400, "identity"},
		{"other case", "POST", "/v1/recover", `{"Identity":"QUdF"}`, 400, "Identity"},
		{"trailing bytes", "POST", "/v1/recover", `{"identity":"QUdF"} {}`, 400, "not valid JSON for this command"},
		{"oversized", "POST", "/v1/recover", `{"identity":"` + strings.Repeat("QUdF", 1<<19) + `"}`, 400, "larger than 2097152 bytes"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			req, err := http.NewRequest(tc.method, "http://kleidi"+tc.path, strings.NewReader(tc.body))
			if err != nil {
				t.Fatal(err)
			}
			resp, err := client.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			b, err := io.ReadAll(resp.Body)
			if err != nil || resp.StatusCode != tc.code || !strings.Contains(string(b), tc.text) || strings.Contains(string(b), "AGE-SECRET") {
				t.Errorf("%v %d %s", err, resp.StatusCode, b)
			}
			if !json.Valid(b) {
				t.Errorf("the answer is no JSON: %s", b)
			}
		})
	}
}

// TestCallEndsWithItsContext hangs in the handler until the client goes away.
func TestCallEndsWithItsContext(t *testing.T) {
	f := start(t)
	entered, ended := make(chan struct{}), make(chan error, 1)
	admin.Handle(f.Server, admin.Verify, func(ctx context.Context, _ admin.VerifyRequest) (admin.KeyringState, error) {
		if d, ok := ctx.Deadline(); !ok || time.Until(d) > 2*time.Minute {
			t.Errorf("deadline %v, %v", d, ok)
		}
		close(entered)
		<-ctx.Done()
		ended <- ctx.Err()
		return admin.KeyringState{}, ctx.Err()
	})
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-entered; cancel() }()
	if _, err := admin.Call(ctx, f.dial(t), admin.Verify, admin.VerifyRequest{}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("handler: %v", err)
	}
}
