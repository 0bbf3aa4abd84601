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
	p, err := k.startOften(ctx, max(o.starts, 1))
	if err != nil {
		return nil, errors.Join(err, machine.PowerOff())
	}
	stop := p.stop
	if err := printTPM(ctx, machine, filepath.Join(dir, "state")); err != nil {
		stop()
		return nil, errors.Join(err, machine.PowerOff())
	}
	p.stop = func() { stop(); _ = machine.PowerOff() }
	return p, nil
}

// startOften starts serve n times, one after the other, prints how long each took,
// and leaves the last one running.
func (k *shipped) startOften(ctx context.Context, n int) (p *plugin, err error) {
	var sockets, statuses []time.Duration
	for range n {
		if p != nil {
			p.stop()
		}
		var socket, status time.Duration
		if p, socket, status, err = k.serve(ctx); err != nil {
			return nil, err
		}
		sockets, statuses = append(sockets, socket), append(statuses, status)
	}
	for _, row := range []struct {
		name string
		took []time.Duration
	}{{"exec to socket", sockets}, {"exec to first good Status", statuses}} {
		fmt.Printf("%-26s ms:", row.name)
		for _, d := range row.took {
			fmt.Printf(" %.1f", d.Seconds()*1e3)
		}
		slices.Sort(row.took)
		fmt.Printf(" (median %.1f)\n", row.took[len(row.took)/2].Seconds()*1e3)
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

// serve starts kleidi serve and waits for its first good Status. It tells when the
// socket was there, and when that Status came.
func (k *shipped) serve(ctx context.Context) (p *plugin, socket, status time.Duration, err error) {
	cmd := exec.Command(k.binary, "--config", k.config, "serve")
	var log bytes.Buffer
	cmd.Stdout, cmd.Stderr = &log, &log
	begin := time.Now()
	if err := cmd.Start(); err != nil {
		return nil, 0, 0, err
	}
	stop := func() { _ = cmd.Process.Signal(syscall.SIGTERM); _ = cmd.Wait() }
	exists := func() error { _, err := os.Stat(k.socket); return err }
	if err = until(ctx, exists); err == nil {
		socket = time.Since(begin)
		err = until(ctx, func() error { return k.status(ctx) })
	}
	if err != nil {
		stop()
		return nil, 0, 0, fmt.Errorf("kleidi serve: %w\n%s", err, log.Bytes())
	}
	return &plugin{name: "kleidi", socket: k.socket, pid: cmd.Process.Pid, stop: stop}, socket, time.Since(begin), nil
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
