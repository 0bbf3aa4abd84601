package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	kmsapi "k8s.io/kms/apis/v2"

	"github.com/beezy-dev/kleidi/grpcserver"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// nothing is a KMS v2 plugin that does nothing but return answers of the usual sizes.
type nothing struct {
	kmsapi.UnimplementedKeyManagementServiceServer
}

// nothingID is as long as a key ID of kleidi.
const nothingID = "k1-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"

// Status answers with nothingID.
func (nothing) Status(context.Context, *kmsapi.StatusRequest) (*kmsapi.StatusResponse, error) {
	return &kmsapi.StatusResponse{Version: "v2", Healthz: "ok", KeyId: nothingID}, nil
}

// Encrypt answers with as many zeros as kleidi's ciphertext has bytes.
func (nothing) Encrypt(_ context.Context, in *kmsapi.EncryptRequest) (*kmsapi.EncryptResponse, error) {
	return &kmsapi.EncryptResponse{Ciphertext: make([]byte, len(in.Plaintext)+29), KeyId: nothingID}, nil
}

// Decrypt answers with zeros.
func (nothing) Decrypt(_ context.Context, in *kmsapi.DecryptRequest) (*kmsapi.DecryptResponse, error) {
	return &kmsapi.DecryptResponse{Plaintext: make([]byte, len(in.Ciphertext)-29)}, nil
}

// memoryKeys is a real keyring that was never sealed.
type memoryKeys struct{ *keyring.Keyring }

// CurrentID implements grpcserver.Keys.
func (k memoryKeys) CurrentID() (seal.KeyID, error) { return k.Keyring.CurrentID(), nil }

func newMemoryKeys() (memoryKeys, error) {
	var cluster seal.ClusterID
	rand.Read(cluster[:])
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		return memoryKeys{}, err
	}
	slot := seal.Slot{Type: seal.TypeRecovery, Data: []byte("{}")}
	k, err := keyring.New(cluster, kek, []seal.Slot{slot}, nil, time.Now())
	return memoryKeys{k}, err
}

// server is the common interface of both kinds of server.
type server interface{ Serve(net.Listener) error }

// tuning holds settings by which a server may answer faster or use less memory. The
// zero tuning keeps the defaults of Go and gRPC.
type tuning struct {
	gogc    int // GOGC, in percent
	workers int // goroutines that wait for calls; each further call starts a new one
	buffers int // bytes of the read buffer and of the write buffer of each connection
}

const tuningVariable = "KLEIDI_BENCH_TUNING"

func (t tuning) String() string { return fmt.Sprintf("%d %d %d", t.gogc, t.workers, t.buffers) }

// apply sets the pace of the garbage collector and returns the options for gRPC.
func (t tuning) apply() (options []grpc.ServerOption) {
	if t.gogc > 0 {
		debug.SetGCPercent(t.gogc)
	}
	if t.workers > 0 {
		options = append(options, grpc.NumStreamWorkers(uint32(t.workers)))
	}
	if t.buffers > 0 {
		options = append(options, grpc.ReadBufferSize(t.buffers), grpc.WriteBufferSize(t.buffers))
	}
	return options
}

// newServer makes the plugin with that name, and its listener at path.
func newServer(name, path string, t tuning) (server, net.Listener, error) {
	if name == "serve-vanilla" {
		l, err := net.Listen("unix", path)
		s := grpc.NewServer()
		kmsapi.RegisterKeyManagementServiceServer(s, nothing{})
		return s, l, err
	}
	l, err := grpcserver.Listen(grpcserver.ListenConfig{Path: path})
	if err != nil {
		return nil, nil, err
	}
	switch name {
	case "serve-nothing":
		s := grpc.NewServer(append(grpcserver.TransportOptions(), t.apply()...)...)
		kmsapi.RegisterKeyManagementServiceServer(s, nothing{})
		return s, l, nil
	case "serve-memory":
		keys, err := newMemoryKeys()
		if err != nil {
			return nil, nil, err
		}
		s, err := grpcserver.New(keys, grpcserver.Options{Registerer: prometheus.NewRegistry()})
		return s, l, err
	}
	return nil, nil, fmt.Errorf("unknown plugin %q", name)
}

// servePlugin is the main function of a plugin's process, which ends with its standard
// input.
func servePlugin(name, path string) error {
	var t tuning
	if v := os.Getenv(tuningVariable); v != "" {
		if _, err := fmt.Sscanf(v, "%d %d %d", &t.gogc, &t.workers, &t.buffers); err != nil {
			return fmt.Errorf("%s: %w", tuningVariable, err)
		}
	}
	s, l, err := newServer(name, path, t)
	if err != nil {
		return err
	}
	failed, done := make(chan error, 1), make(chan struct{})
	go func() { failed <- s.Serve(l) }()
	go func() { _, _ = io.Copy(io.Discard, os.Stdin); close(done) }()
	fmt.Println("ready")
	select {
	case err := <-failed:
		return err
	case <-done:
		return l.Close()
	}
}

// plugin is a measured process.
type plugin struct {
	name, socket string
	pid          int
	stop         func()
}

// startSelf starts this program as a plugin.
func startSelf(ctx context.Context, name, dir string) (*plugin, error) {
	return startTuned(ctx, name, dir, tuning{})
}

func startTuned(ctx context.Context, name, dir string, t tuning) (*plugin, error) {
	dir, err := os.MkdirTemp(dir, name)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(dir, "kms.sock")
	cmd := exec.CommandContext(ctx, "/proc/self/exe", name, path)
	cmd.Env = append(os.Environ(), tuningVariable+"="+t.String(), "GOGC=") // GOGC may be set only for kleidi
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	stop := func() { in.Close(); _ = cmd.Wait() }
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		stop()
		return nil, errors.Join(fmt.Errorf("%s does not start", name), err)
	}
	return &plugin{name: name, socket: path, pid: cmd.Process.Pid, stop: stop}, nil
}

func startSubject(ctx context.Context, o options, dir string) (*plugin, error) {
	switch {
	case o.kleidi != "":
		return startKleidi(ctx, o, dir)
	case o.socket != "":
		return &plugin{name: "kleidi", socket: o.socket, pid: o.pid, stop: func() {}}, nil
	}
	return startSelf(ctx, "serve-memory", dir)
}
