package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	kmsapi "k8s.io/kms/apis/v2"

	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/recovery"
	"github.com/beezy-dev/kleidi/seal/store"
	"github.com/beezy-dev/kleidi/tpm/simboot"
)

// dev is a simulated machine with kleidi on it.
type dev struct {
	dir  string
	once bool
	boot simboot.Boot
	load func(path string) (*config.Config, error)
	log  func(*config.Config) *slog.Logger
	say  func(format string, args ...any)
}

func (a *app) newDev() *cobra.Command {
	var d dev
	var loader string
	cmd := &cobra.Command{
		Use:   "dev",
		Short: "Run all of it on a simulated machine: swtpm, measured boot, init, serve",
		Long: `Run kleidi on a simulated machine: a software TPM (swtpm) that boots with measurements
and an event log, as a real machine does. It makes a keyring the first time, serves
KMS v2, and checks itself through the socket. The folder keeps the machine's state.

Boot it with another --kernel, --command-line or with --secure-boot=false, and see
kleidi refuse. NOT for real Secrets: the recovery identity lies in the folder.`,
		Example: `  kleidi dev
  kleidi dev --kernel 6.13.1-evil      # another kernel: kleidi stays locked, and says why
  kleidi --config ~/.local/state/kleidi/dev/config.yaml status`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := d.resolve(simboot.Loader(loader), cmd.Flags().Changed("secure-boot")); err != nil {
				return err
			}
			d.log = logger
			d.load = func(path string) (*config.Config, error) {
				own := *a
				own.configPath = path
				return own.config()
			}
			d.say = func(format string, args ...any) { fmt.Fprintf(cmd.OutOrStdout(), format+"\n", args...) }
			return d.run(cmd.Context())
		},
	}
	base := simboot.Baseline(simboot.UKI)
	flags := cmd.Flags()
	flags.StringVar(&d.dir, "dir", "", "the machine's folder (default $XDG_STATE_HOME/kleidi/dev, or ~/.local/state/kleidi/dev)")
	flags.BoolVar(&d.once, "once", false, "stop after the self-check")
	flags.StringVar(&loader, "loader", string(simboot.UKI), "how the machine boots: uki, grub or efi-stub; direct, which measures nothing, is refused by kleidi init")
	flags.StringVar(&d.boot.Kernel, "kernel", base.Kernel, "the kernel's version")
	flags.StringVar(&d.boot.CommandLine, "command-line", base.CommandLine, "the kernel's command line")
	flags.StringVar(&d.boot.Initrd, "initrd", base.Initrd, "the initrd's content")
	flags.BoolVar(&d.boot.SecureBoot, "secure-boot", true, "whether Secure Boot is on (efi-stub: off)")
	return cmd
}

// resolve lays what the flags say over the loader's ordinary boot.
func (d *dev) resolve(loader simboot.Loader, secureBootGiven bool) error {
	given := d.boot
	d.boot = simboot.Baseline(loader)
	d.boot.Kernel, d.boot.CommandLine, d.boot.Initrd = given.Kernel, given.CommandLine, given.Initrd
	if secureBootGiven {
		d.boot.SecureBoot = given.SecureBoot
	}
	if err := d.boot.Validate(); err != nil {
		return err
	}
	if d.dir == "" {
		state := os.Getenv("XDG_STATE_HOME")
		if state == "" {
			home, err := os.UserHomeDir()
			if err != nil {
				return fmt.Errorf("%w; name a folder with --dir", err)
			}
			state = filepath.Join(home, ".local", "state")
		}
		d.dir = filepath.Join(state, "kleidi", "dev")
	}
	var err error
	d.dir, err = filepath.Abs(d.dir)
	return err
}

func (d *dev) path(name string) string { return filepath.Join(d.dir, name) }

// run boots the machine, makes a keyring where there is none, and serves.
func (d *dev) run(ctx context.Context) error {
	if err := os.MkdirAll(d.dir, 0o700); err != nil {
		return err
	}
	machine, err := simboot.New(d.path("machine"))
	if err != nil {
		return err
	}
	start := time.Now()
	if err := machine.Boot(ctx, d.boot); err != nil {
		return err
	}
	defer func() { _ = machine.PowerOff() }()
	d.say("[dev] machine booted in %v: %s, kernel %s, Secure Boot %s", time.Since(start).Round(time.Millisecond), d.boot.Loader, d.boot.Kernel, onOff(d.boot.SecureBoot))
	d.say("[dev] the files that it booted lie in %s, for kleidi reseal --next-…", machine.Files())
	cfg, err := d.config(machine)
	if err != nil {
		return err
	}
	if err := d.initialize(ctx, cfg); err != nil {
		return err
	}
	return d.serve(ctx, cfg)
}

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

// config writes a configuration file for this machine, so that every other
// command works on it with --config.
func (d *dev) config(m *simboot.Machine) (*config.Config, error) {
	file := map[string]any{
		"apiVersion": config.APIVersion, "kind": config.Kind, "node": "dev",
		"state": map[string]any{"dir": d.path("state")},
		"tpm":   map[string]any{"device": m.Device(), "eventLog": m.EventLog(), "userspaceEventLog": m.UserspaceLog()},
		"kms":   map[string]any{"socket": d.path("kms.sock")},
		"admin": map[string]any{"socket": d.path("admin.sock")},
		"http":  map[string]any{"address": ""},
		"log":   map[string]any{"level": "warn"},
	}
	b, err := yaml.Marshal(file)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(d.path("config.yaml"), b, 0o600); err != nil {
		return nil, err
	}
	return d.load(d.path("config.yaml"))
}

// initialize makes a keyring where the machine has none.
func (d *dev) initialize(ctx context.Context, cfg *config.Config) error {
	if _, err := os.Stat(cfg.Keyring()); !errors.Is(err, fs.ErrNotExist) {
		d.say("[dev] the keyring of an earlier run is kept")
		return err
	}
	n, err := newNode(cfg, d.log(cfg), nil)
	if err != nil {
		return err
	}
	defer n.close()
	recipient, err := d.makeIdentity(ctx, n.mem)
	if err != nil {
		return err
	}
	r, err := n.initialize(ctx, initOptions{Recipients: []string{recipient}, Progress: func(step string) { fmt.Fprintln(os.Stderr, "[init]", step) }})
	if err != nil {
		return err
	}
	d.say("[dev] KEK %s sealed: %s", r.KeyID, r.Slots[0])
	d.say("[dev] its recovery identity lies in %s: good enough to play, not for real Secrets", d.path("recovery.txt"))
	return nil
}

// makeIdentity writes a recovery identity beside the machine. An earlier one, of
// an init that did not end, is replaced.
func (d *dev) makeIdentity(ctx context.Context, mem seal.Memory) (string, error) {
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
func (d *dev) serve(ctx context.Context, cfg *config.Config) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := newServer(cfg, d.log(cfg))
	if err != nil {
		return err
	}
	ended := make(chan struct{})
	go func() { defer close(ended); s.run(ctx) }()
	<-s.node.unlocker.Tried()
	if _, err = s.node.unlocker.Keyring(); err == nil {
		err = selfCheck(ctx, cfg.KMS.Socket, d.say)
	} else {
		d.say("[dev] locked: %v", err)
		d.say("[dev] to open it again: boot as before, or\n      kleidi --config %s recover --identity-file %s", d.path("config.yaml"), d.path("recovery.txt"))
	}
	if d.once {
		cancel()
	} else {
		d.say("[dev] serving on unix://%s; end it with Ctrl-C", cfg.KMS.Socket)
		d.say("[dev] in another terminal: kleidi --config %s status", d.path("config.yaml"))
		err = nil
	}
	<-ended
	return err
}

// selfCheckTimeout bounds how long the self-check waits for the socket.
const selfCheckTimeout = 30 * time.Second

// selfCheck does what kube-apiserver does: Status, Encrypt of a fresh DEK seed,
// Decrypt.
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
