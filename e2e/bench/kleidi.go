package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"filippo.io/age"
	kmsapi "k8s.io/kms/apis/v2"

	"github.com/beezy-dev/kleidi/tpm/simboot"
)

// startLimit bounds the start of kleidi serve.
const startLimit = 30 * time.Second

// startKleidi boots a simulated machine, lets the binary seal a KEK to its TPM,
// and serves. It starts o.starts times, prints how soon the first good Status
// came, and leaves the last one running.
func startKleidi(ctx context.Context, o options, dir string) (*plugin, error) {
	machine, err := simboot.New(filepath.Join(dir, "machine"))
	if err != nil {
		return nil, err
	}
	if err := machine.Boot(ctx, simboot.Baseline(simboot.UKI)); err != nil {
		return nil, err
	}
	k := &shipped{binary: o.kleidi, socket: filepath.Join(dir, "kms.sock"), config: filepath.Join(dir, "config.yaml")}
	if err := k.prepare(ctx, machine, dir); err != nil {
		return nil, errors.Join(err, machine.PowerOff())
	}
	var p *plugin
	var took []time.Duration
	for range max(o.starts, 1) {
		if p != nil {
			p.stop()
		}
		var d time.Duration
		if p, d, err = k.serve(ctx); err != nil {
			return nil, errors.Join(err, machine.PowerOff())
		}
		took = append(took, d)
	}
	fmt.Printf("exec to first good Status, ms: ")
	for _, d := range took {
		fmt.Printf("%.1f ", d.Seconds()*1e3)
	}
	slices.Sort(took)
	fmt.Printf("(median %.1f)\n\n", took[len(took)/2].Seconds()*1e3)
	stop := p.stop
	p.stop = func() { stop(); _ = machine.PowerOff() }
	return p, nil
}

// shipped is the binary and where it works.
type shipped struct{ binary, socket, config string }

// prepare writes the configuration and runs init.
func (k *shipped) prepare(ctx context.Context, m *simboot.Machine, dir string) error {
	config := fmt.Sprintf(`apiVersion: kleidi.beezy.dev/v1alpha1
kind: KleidiConfiguration
node: bench
state: {dir: %q}
tpm: {device: %q, eventLog: %q, userspaceEventLog: %q}
kms: {socket: %q}
admin: {socket: %q}
http: {address: ""}
`, filepath.Join(dir, "state"), m.Device(), m.EventLog(), m.UserspaceLog(), k.socket, filepath.Join(dir, "admin.sock"))
	if err := os.WriteFile(k.config, []byte(config), 0o600); err != nil {
		return err
	}
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		return err
	}
	out, err := exec.CommandContext(ctx, k.binary, "--config", k.config, "init",
		"--recovery-recipient", identity.Recipient().String()).CombinedOutput()
	if err != nil {
		return fmt.Errorf("kleidi init: %w\n%s", err, out)
	}
	return nil
}

// serve starts kleidi serve and waits for its first good Status.
func (k *shipped) serve(ctx context.Context) (*plugin, time.Duration, error) {
	cmd := exec.Command(k.binary, "--config", k.config, "serve")
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	begin := time.Now()
	if err := cmd.Start(); err != nil {
		return nil, 0, err
	}
	stop := func() { _ = cmd.Process.Signal(syscall.SIGTERM); _ = cmd.Wait() }
	if err := k.firstStatus(ctx); err != nil {
		stop()
		return nil, 0, fmt.Errorf("kleidi serve: %w\n%s", err, log.Bytes())
	}
	return &plugin{name: "kleidi", socket: k.socket, pid: cmd.Process.Pid, stop: stop}, time.Since(begin), nil
}

// firstStatus asks, a thousand times a second, until the answer is good.
func (k *shipped) firstStatus(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	last := errors.New("no socket yet")
	for {
		if _, err := os.Stat(k.socket); err == nil {
			if last = k.status(ctx); last == nil {
				return nil
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return errors.Join(ctx.Err(), last)
		}
	}
}

func (k *shipped) status(ctx context.Context) error {
	conn, err := dial(k.socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = kmsapi.NewKeyManagementServiceClient(conn).Status(ctx, &kmsapi.StatusRequest{})
	return err
}
