// Command demo shows on a simulated machine what kleidi does: a KEK sealed to a TPM, DEK
// seeds encrypted under it, a rotation, another kernel that gets nothing, and the
// recovery. It runs the kleidi binary as an operator does and calls it as kube-apiserver
// does. It checks every step, and stops at the first one whose result is not as
// announced.
package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"filippo.io/age"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/beezy-dev/kleidi/tpm/simboot"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: demo PATH-OF-KLEIDI")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "\nthe demo failed:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, kleidi string) error {
	dir, err := os.MkdirTemp("", "kleidi-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	machine, err := simboot.New(filepath.Join(dir, "machine"))
	if err != nil {
		return err
	}
	d := &demo{dir: dir, kleidi: kleidi, machine: machine, boot: simboot.Baseline(simboot.UKI)}
	defer d.clean()
	start := time.Now()
	for i, step := range []struct {
		title string
		do    func(context.Context) error
	}{
		{"A machine boots, and measures what it boots into its TPM", d.bootFirst},
		{"kleidi makes a KEK and seals it to this TPM, under this boot", d.initialize},
		{"kleidi serves; kube-apiserver's part is played by a KMS v2 client", d.serve},
		{"DEK seeds are encrypted and decrypted through the socket", d.encrypt},
		{"The KEK is rotated; what was encrypted before still decrypts", d.rotate},
		{"The same machine boots ANOTHER kernel: the TPM keeps the KEK", d.bootOther},
		{"The operator knows that kernel, and gives the recovery identity", d.recover},
		{"The first kernel again, with a copy of the keyring that opened there", d.bootBack},
	} {
		fmt.Printf("\n%s %s\n", bold(fmt.Sprintf("%d.", i+1)), bold(step.title))
		if err := step.do(ctx); err != nil {
			return fmt.Errorf("step %d: %w", i+1, err)
		}
	}
	d.summary(time.Since(start))
	return nil
}

// demo is the machine, with everything that the client has encrypted so far.
type demo struct {
	dir     string
	kleidi  string
	machine *simboot.Machine
	boot    simboot.Boot
	server  *server
	sealed  []sealed
	keyIDs  []string // every current key ID, in order
	ready   time.Duration
}

func (d *demo) path(name string) string { return filepath.Join(d.dir, name) }

func (d *demo) clean() {
	d.server.stop()
	_ = d.machine.PowerOff()
}

func (d *demo) bootFirst(ctx context.Context) error {
	if err := d.machine.Boot(ctx, d.boot); err != nil {
		return err
	}
	say("firmware, Secure Boot keys, unified kernel image: all in PCRs 0 to 11, with an event log")
	say("kernel %s, command line %q", d.boot.Kernel, d.boot.CommandLine)
	return os.WriteFile(d.path("config.yaml"), []byte(fmt.Sprintf(`apiVersion: kleidi.beezy.dev/v1alpha1
kind: KleidiConfiguration
node: cp-1
state: {dir: %[1]s/state}
tpm: {device: "%[2]s", eventLog: %[3]s, userspaceEventLog: %[4]s}
kms: {socket: %[1]s/kms.sock}
admin: {socket: %[1]s/admin.sock}
http: {socket: ""}
`, d.dir, d.machine.Device(), d.machine.EventLog(), d.machine.UserspaceLog())), 0o600)
}

func (d *demo) initialize(ctx context.Context) error {
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		return err
	}
	if err := os.WriteFile(d.path("recovery.txt"), []byte(identity.String()+"\n"), 0o600); err != nil {
		return err
	}
	out, err := d.run(ctx, "init", "--recovery-recipient", identity.Recipient().String())
	if err != nil {
		return err
	}
	show(out)
	b, err := os.ReadFile(d.path("state/keyring.json"))
	if err != nil {
		return err
	}
	say("on the disk: %d bytes, none of which opens without this TPM in this boot, or the recovery identity", len(b))
	return nil
}

func (d *demo) serve(ctx context.Context) error {
	start := time.Now()
	var err error
	if d.server, err = startServer(d); err != nil {
		return err
	}
	s, err := d.server.status(ctx)
	if err != nil {
		return err
	}
	d.ready = time.Since(start)
	d.keyIDs = append(d.keyIDs, s.KeyId)
	say("ready %v after its start: boot attested, KEK unsealed", d.ready.Round(time.Millisecond))
	say("Status: version %s, healthz %q, key ID %s", s.Version, s.Healthz, s.KeyId)
	return nil
}

// encrypt encrypts three DEK seeds, as three starts of kube-apiserver would.
func (d *demo) encrypt(ctx context.Context) error {
	for range 3 {
		seed := make([]byte, 32)
		rand.Read(seed)
		s, err := d.server.encrypt(ctx, seed)
		if err != nil {
			return err
		}
		d.sealed = append(d.sealed, s)
	}
	say("32-byte seed in, %d bytes out: %x…", len(d.sealed[0].ciphertext), d.sealed[0].ciphertext[:16])
	return d.decryptAll(ctx)
}

// decryptAll proves that nothing was lost.
func (d *demo) decryptAll(ctx context.Context) error {
	for _, s := range d.sealed {
		seed, err := d.server.decrypt(ctx, s)
		if err != nil {
			return err
		}
		if !bytes.Equal(seed, s.seed) {
			return errors.New("a DEK seed came back altered")
		}
	}
	say("%s all %d seeds decrypt", tick(), len(d.sealed))
	return nil
}

func (d *demo) rotate(ctx context.Context) error {
	out, err := d.run(ctx, "rotate")
	if err != nil {
		return err
	}
	show(out)
	if err := d.newKey(ctx); err != nil {
		return err
	}
	return d.decryptAll(ctx)
}

// newKey checks that the current key ID was never seen before, and encrypts a seed
// under it.
func (d *demo) newKey(ctx context.Context) error {
	s, err := d.server.status(ctx)
	if err != nil {
		return err
	}
	for _, old := range d.keyIDs {
		if s.KeyId == old {
			return fmt.Errorf("the key ID is still, or again, %s", old)
		}
	}
	d.keyIDs = append(d.keyIDs, s.KeyId)
	fresh, err := d.server.encrypt(ctx, bytes.Repeat([]byte{byte(len(d.keyIDs))}, 32))
	if err != nil {
		return err
	}
	if fresh.keyID != s.KeyId {
		return fmt.Errorf("encrypted under %s, and announced is %s", fresh.keyID, s.KeyId)
	}
	d.sealed = append(d.sealed, fresh)
	return nil
}

// reboot boots the machine in another way and starts kleidi on it.
func (d *demo) reboot(ctx context.Context, boot simboot.Boot) error {
	d.server.stop()
	if err := d.machine.Boot(ctx, boot); err != nil {
		return err
	}
	var err error
	d.server, err = startServer(d)
	return err
}

func (d *demo) bootOther(ctx context.Context) error {
	other := d.boot
	other.Kernel = "6.12.63+deb13-amd64"
	if err := d.copyState("kept", "keyring.json", "anchor.json"); err != nil {
		return err
	}
	if err := d.reboot(ctx, other); err != nil {
		return err
	}
	say("kernel %s", other.Kernel)
	return d.expectRefusal(ctx, "PCR 4", "PCR 11", "kernel")
}

// expectRefusal makes a client call, and demands an error that contains these names.
func (d *demo) expectRefusal(ctx context.Context, names ...string) error {
	_, err := d.server.status(ctx)
	if status.Code(err) != codes.Unavailable {
		return fmt.Errorf("expected a refusal, got %v", err)
	}
	reason := status.Convert(err).Message()
	for _, n := range names {
		if !strings.Contains(reason, n) {
			return fmt.Errorf("the refusal does not name %q: %s", n, reason)
		}
	}
	for _, line := range strings.Split(reason, "; ") {
		fmt.Println("     " + red(line))
	}
	say("%s kleidi stays up and answers with that; nothing was decrypted", tick())
	return nil
}

func (d *demo) recover(ctx context.Context) error {
	out, err := d.run(ctx, "recover", "--identity-file", d.path("recovery.txt"))
	if err != nil {
		return err
	}
	show(out)
	if err := d.newKey(ctx); err != nil {
		return err
	}
	return d.decryptAll(ctx)
}

// copyState copies files of the state folder to files with a suffix, like an attacker who
// wants to put them back later.
func (d *demo) copyState(suffix string, names ...string) error {
	for _, n := range names {
		if err := copyFile(d.path("state/"+n), d.path(n+"."+suffix)); err != nil {
			return err
		}
	}
	return nil
}

func copyFile(from, to string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, b, 0o600)
}

func (d *demo) bootBack(ctx context.Context) error {
	d.server.stop()
	for _, n := range []string{"keyring.json", "anchor.json"} {
		if err := copyFile(d.path(n+".kept"), d.path("state/"+n)); err != nil {
			return err
		}
	}
	if err := d.reboot(ctx, d.boot); err != nil {
		return err
	}
	say("kernel %s; keyring and anchor as they were before the recovery", d.boot.Kernel)
	return d.expectRefusal(ctx, "revoked", "epoch")
}

func (d *demo) summary(took time.Duration) {
	fmt.Printf("\n%s\n", bold("What you saw"))
	say("%s a KEK that never left the TPM's protection but into locked memory", tick())
	say("%s %d DEK seeds under %d KEKs, all of which decrypt", tick(), len(d.sealed), len(d.keyIDs))
	say("%s a boot that was not authorised, refused by the TPM, with the PCR and the event that changed", tick())
	say("%s a way back that lost nothing, and revoked what came before: kept copies included", tick())
	fmt.Printf("\n   %v in all. Play with it: bin/kleidi dev. On a real node: README.md\n", took.Round(10*time.Millisecond))
}
