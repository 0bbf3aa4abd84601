package dev

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"go.yaml.in/yaml/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	kmsapi "k8s.io/kms/apis/v2"

	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/founding"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/serve"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/recovery"
	"github.com/beezy-dev/kleidi/seal/store"
	"github.com/beezy-dev/kleidi/tpm/simboot"
)

// Dev is a simulated machine with kleidi on it.
type Dev struct {
	Dir  string
	Once bool
	Boot simboot.Boot
	Load func(path string) (*config.Config, error)
	Log  func(*config.Config) *slog.Logger
	Say  func(format string, args ...any)
}

// Resolve applies the flags to the loader's ordinary boot.
func (d *Dev) Resolve(loader simboot.Loader, secureBootGiven bool) error {
	given := d.Boot
	d.Boot = simboot.Baseline(loader)
	d.Boot.Kernel, d.Boot.CommandLine, d.Boot.Initrd = given.Kernel, given.CommandLine, given.Initrd
	if secureBootGiven {
		d.Boot.SecureBoot = given.SecureBoot
	}
	if err := d.Boot.Validate(); err != nil {
		return err
	}
	if d.Dir == "" {
		state := os.Getenv("XDG_STATE_HOME")
		if state == "" {
			home, err := os.UserHomeDir()
			if err != nil {
				return fmt.Errorf("%w; name a folder with --dir", err)
			}
			state = filepath.Join(home, ".local", "state")
		}
		d.Dir = filepath.Join(state, "kleidi", "dev")
	}
	var err error
	d.Dir, err = filepath.Abs(d.Dir)
	return err
}

// command is how a shell starts this kleidi: by its name, or by its path if PATH leads to
// no kleidi, or to another one.
func command() string {
	self, err := os.Executable()
	if err != nil {
		return "kleidi"
	}
	if found, err := exec.LookPath("kleidi"); err == nil && sameFile(found, self) {
		return "kleidi"
	}
	return seal.Quote(self)
}

func sameFile(a, b string) bool {
	x, err := os.Stat(a)
	y, err2 := os.Stat(b)
	return err == nil && err2 == nil && os.SameFile(x, y)
}

func (d *Dev) path(name string) string { return filepath.Join(d.Dir, name) }

// Run boots the machine, makes a keyring if there is none, and serves.
func (d *Dev) Run(ctx context.Context) error {
	if err := os.MkdirAll(d.Dir, 0o700); err != nil {
		return err
	}
	machine, err := simboot.New(d.path("machine"))
	if err != nil {
		return err
	}
	start := time.Now()
	if err := machine.Boot(ctx, d.Boot); err != nil {
		return err
	}
	defer func() { _ = machine.PowerOff() }()
	d.Say("[dev] machine booted in %v: %s, kernel %s, Secure Boot %s", time.Since(start).Round(time.Millisecond), d.Boot.Loader, d.Boot.Kernel, onOff(d.Boot.SecureBoot))
	d.Say("[dev] the files of this boot are in %s, for kleidi reseal --next-…", machine.Files())
	cfg, err := d.config(machine)
	if err != nil {
		return err
	}
	if err := d.initialize(ctx, cfg); err != nil {
		return err
	}
	return d.serve(ctx, cfg)
}

// config writes a configuration file for this machine, so that every other command can
// use it with --config.
func (d *Dev) config(m *simboot.Machine) (*config.Config, error) {
	file := map[string]any{
		"apiVersion": config.APIVersion, "kind": config.Kind, "node": "dev",
		"state": map[string]any{"dir": d.path("state")},
		"tpm":   map[string]any{"device": m.Device(), "eventLog": m.EventLog(), "userspaceEventLog": m.UserspaceLog()},
		"kms":   map[string]any{"socket": d.path("kms.sock")},
		"admin": map[string]any{"socket": d.path("admin.sock")},
		"http":  map[string]any{"socket": ""},
		"log":   map[string]any{"level": "warn"},
	}
	b, err := yaml.Marshal(file)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(d.path("config.yaml"), b, 0o600); err != nil {
		return nil, err
	}
	return d.Load(d.path("config.yaml"))
}

// initialize makes a keyring if the machine has none.
func (d *Dev) initialize(ctx context.Context, cfg *config.Config) error {
	if _, err := os.Stat(cfg.Keyring()); !errors.Is(err, fs.ErrNotExist) {
		d.Say("[dev] the keyring of an earlier run is kept")
		return err
	}
	n, err := node.New(cfg, d.Log(cfg), nil)
	if err != nil {
		return err
	}
	defer n.Close()
	recipient, err := d.makeIdentity(ctx, n.Memory)
	if err != nil {
		return err
	}
	r, err := founding.Init(ctx, n, founding.InitOptions{Recipients: []string{recipient}, Progress: func(step string) { fmt.Fprintln(os.Stderr, "[init]", step) }})
	if err != nil {
		return err
	}
	d.Say("[dev] KEK %s sealed: %s", r.KeyID, r.Slots[0])
	d.Say("[dev] its recovery identity is in %s: good enough for trying out, not for real Secrets", d.path("recovery.txt"))
	return nil
}

// makeIdentity writes a recovery identity beside the machine. It replaces the identity
// of an earlier init that did not end.
func (d *Dev) makeIdentity(ctx context.Context, mem seal.Memory) (string, error) {
	identity, recipient, err := recovery.GenerateIdentity(mem)
	if err != nil {
		return "", err
	}
	defer identity.Close()
	f := store.NewFile(d.path("recovery.txt"))
	_, version, err := f.Load(ctx)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	identity.With(func(b []byte) { _, err = f.Save(ctx, b, version) })
	return recipient, err
}

// serve serves until it is interrupted, or until the self-check has ended.
func (d *Dev) serve(ctx context.Context, cfg *config.Config) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := serve.New(cfg, d.Log(cfg))
	if err != nil {
		return err
	}
	ended := make(chan struct{})
	go func() { defer close(ended); s.Run(ctx) }()
	<-s.Node.Unlocker.Tried()
	if _, err = s.Node.Unlocker.Keyring(); err == nil {
		err = selfCheck(ctx, cfg.KMS.Socket, d.Say)
	} else {
		d.Say("[dev] locked: %v", err)
		d.Say("[dev] to open it again: boot as before, or\n      %s --config %s recover --identity-file %s", command(), seal.Quote(d.path("config.yaml")), seal.Quote(d.path("recovery.txt")))
	}
	if d.Once {
		cancel()
	} else {
		d.Say("[dev] serving on unix://%s; end it with Ctrl-C", cfg.KMS.Socket)
		d.Say("[dev] in another terminal: %s --config %s status", command(), seal.Quote(d.path("config.yaml")))
		err = nil
	}
	<-ended
	return err
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

// selfCheckTimeout bounds the self-check's wait for the socket.
const selfCheckTimeout = 30 * time.Second

// selfCheck makes kube-apiserver's calls: Status, Encrypt of a fresh DEK seed, Decrypt.
func selfCheck(ctx context.Context, socket string, say func(string, ...any)) error {
	ctx, cancel := context.WithTimeout(ctx, selfCheckTimeout)
	defer cancel()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	if err != nil {
		return err
	}
	defer conn.Close()
	client := kmsapi.NewKeyManagementServiceClient(conn)
	status, err := client.Status(ctx, &kmsapi.StatusRequest{})
	if err != nil {
		return err
	}
	seed := make([]byte, 32)
	rand.Read(seed)
	defer clear(seed)
	sealed, err := client.Encrypt(ctx, &kmsapi.EncryptRequest{Uid: "self-check", Plaintext: seed})
	if err != nil {
		return err
	}
	opened, err := client.Decrypt(ctx, &kmsapi.DecryptRequest{Uid: "self-check", Ciphertext: sealed.Ciphertext, KeyId: sealed.KeyId})
	if err != nil {
		return err
	}
	defer clear(opened.Plaintext)
	if !bytes.Equal(opened.Plaintext, seed) || sealed.KeyId != status.KeyId {
		return errors.New("self-check: what was decrypted is not what was encrypted")
	}
	say("[dev] self-check through the socket passed: Status %s, a DEK seed encrypted (%d bytes) and decrypted", status.Healthz, len(sealed.Ciphertext))
	return nil
}
