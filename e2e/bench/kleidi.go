package main

import (
	"bytes"
	"context"
	"encoding/json"
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
	p, err := k.startOften(ctx, max(o.starts, 1))
	if err != nil {
		return nil, errors.Join(err, machine.PowerOff())
	}
	stop := p.stop
	if err := printTPM(ctx, o, machine, dir); err != nil {
		stop()
		return nil, errors.Join(err, machine.PowerOff())
	}
	p.stop = func() { stop(); _ = machine.PowerOff() }
	return p, nil
}

// startOften starts serve n times, one after the other, prints how long each took,
// and leaves the last one running.
func (k *shipped) startOften(ctx context.Context, n int) (p *plugin, err error) {
	steps := []string{"exec to socket", "  boot attested in", "  KEK unsealed in", "exec to first good Status"}
	took := make([][]time.Duration, len(steps))
	for range n {
		if p != nil {
			p.stop()
		}
		var one []time.Duration
		if p, one, err = k.serve(ctx); err != nil {
			return nil, err
		}
		for i, d := range one {
			took[i] = append(took[i], d)
		}
	}
	for i, name := range steps {
		fmt.Printf("%-26s ms:", name)
		for _, d := range took[i] {
			fmt.Printf(" %.1f", d.Seconds()*1e3)
		}
		slices.Sort(took[i])
		fmt.Printf(" (median %.1f)\n", took[i][n/2].Seconds()*1e3)
	}
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
http: {socket: ""}
log: {format: json}
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

// serve starts kleidi serve and waits for its first good Status. It tells when the
// socket was there, how long kleidi says that attestation and unsealing took, and
// when that Status came.
func (k *shipped) serve(ctx context.Context) (*plugin, []time.Duration, error) {
	cmd := exec.Command(k.binary, "--config", k.config, "serve")
	log, err := os.Create(k.config + ".log")
	if err != nil {
		return nil, nil, err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	begin := time.Now()
	if err := cmd.Start(); err != nil {
		return nil, nil, err
	}
	stop := func() { _ = cmd.Process.Signal(syscall.SIGTERM); _ = cmd.Wait() }
	var socket, status time.Duration
	exists := func() error { _, err := os.Stat(k.socket); return err }
	if err = until(ctx, exists); err == nil {
		socket = time.Since(begin)
		if err = until(ctx, func() error { return k.status(ctx) }); err == nil {
			status = time.Since(begin)
		}
	}
	var steps struct{ Gate, Slots time.Duration }
	if err == nil {
		steps, err = opened(log.Name())
	}
	if err != nil {
		stop()
		said, _ := os.ReadFile(log.Name())
		return nil, nil, fmt.Errorf("kleidi serve: %w\n%s", err, said)
	}
	return &plugin{name: "kleidi", socket: k.socket, pid: cmd.Process.Pid, stop: stop},
		[]time.Duration{socket, steps.Gate, steps.Slots, status}, nil
}

// opened reads how long the steps of unlocking took from kleidi's log.
func opened(log string) (steps struct{ Gate, Slots time.Duration }, err error) {
	b, err := os.ReadFile(log)
	if err != nil {
		return steps, err
	}
	for line := range bytes.Lines(b) {
		var record struct {
			Msg         string
			Gate, Slots time.Duration
		}
		if json.Unmarshal(line, &record) == nil && record.Msg == "open" {
			steps.Gate, steps.Slots = record.Gate, record.Slots
			return steps, nil
		}
	}
	return steps, errors.New("the log does not say that it is open")
}

// until repeats f, a thousand times a second, until it succeeds.
func until(ctx context.Context, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		}
	}
}

func (k *shipped) status(ctx context.Context) error {
	conn, err := dial(k.socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	_, err = kmsapi.NewKeyManagementServiceClient(conn).Status(ctx, &kmsapi.StatusRequest{})
	return err
}
