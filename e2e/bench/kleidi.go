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
	"strings"
	"syscall"
	"time"

	"filippo.io/age"
	kmsapi "k8s.io/kms/apis/v2"

	"github.com/beezy-dev/kleidi/tpm/simboot"
)

// startLimit bounds the start of kleidi serve.
const startLimit = 30 * time.Second

// startKleidi boots a simulated machine, lets the binary seal a KEK to its TPM, and
// serves. It starts kleidi o.starts times, prints the time to the first good Status,
// and leaves the last one running.
func startKleidi(ctx context.Context, o options, dir string) (*plugin, error) {
	machine, err := simboot.New(filepath.Join(dir, "machine"))
	if err != nil {
		return nil, err
	}
	if err := machine.Boot(ctx, simboot.Baseline(simboot.UKI)); err != nil {
		return nil, err
	}
	p, err := startOn(ctx, o, machine, dir)
	if err != nil {
		return nil, errors.Join(err, machine.PowerOff())
	}
	stop := p.stop
	p.stop = func() { stop(); _ = machine.PowerOff() }
	return p, nil
}

func startOn(ctx context.Context, o options, machine *simboot.Machine, dir string) (*plugin, error) {
	k := newShipped(o.kleidi, machine, dir, "bench")
	config, err := k.configure("state", machine.Device())
	if err == nil {
		err = k.init(ctx, config)
	}
	if err == nil {
		err = k.printStarts(ctx, config, max(o.starts, 1))
	}
	if err == nil {
		err = k.printHistory(ctx, config, max(o.starts, 1))
	}
	if err == nil {
		err = k.printNodes(ctx, config, max(o.starts, 1))
	}
	if err == nil {
		err = k.printJoins(ctx, max(o.starts, 1))
	}
	if err == nil {
		err = k.printModels(ctx)
	}
	if err == nil {
		err = printTPM(ctx, o, machine, dir)
	}
	if err != nil {
		return nil, err
	}
	p, _, err := k.serve(ctx, config)
	return p, err
}

// started holds the measurements of a start of serve.
type started struct {
	socket, gate, slots, rest, status time.Duration
	refused                           int // calls before the first good Status
}

var steps = []struct {
	name string
	of   func(started) time.Duration
}{
	{"exec to socket", func(s started) time.Duration { return s.socket }},
	{"  boot attested in", func(s started) time.Duration { return s.gate }},
	{"  KEK unsealed in", func(s started) time.Duration { return s.slots }},
	{"  keyring read and opened in", func(s started) time.Duration { return s.rest }},
	{"exec to first good Status", func(s started) time.Duration { return s.status }},
}

// starts starts serve n times with each configuration, alternating.
func (k *shipped) starts(ctx context.Context, n int, configs ...string) ([][]started, error) {
	all := make([][]started, len(configs))
	for range n {
		for i, config := range configs {
			p, s, err := k.serve(ctx, config)
			if err != nil {
				return nil, err
			}
			p.stop()
			all[i] = append(all[i], s)
		}
	}
	return all, nil
}

func medianTime(all []started, of func(started) time.Duration) time.Duration {
	var took []time.Duration
	for _, s := range all {
		took = append(took, of(s))
	}
	slices.Sort(took)
	return took[len(took)/2]
}

func inMS(d time.Duration) float64 { return d.Seconds() * 1e3 }

func (k *shipped) printStarts(ctx context.Context, config string, n int) error {
	all, err := k.starts(ctx, n, config)
	if err != nil {
		return err
	}
	for _, step := range steps {
		fmt.Printf("%-29s ms:", step.name)
		for _, s := range all[0] {
			fmt.Printf(" %.1f", inMS(step.of(s)))
		}
		fmt.Printf(" (median %.1f)\n", inMS(medianTime(all[0], step.of)))
	}
	return nil
}

// shipped is the binary, and its machine.
type shipped struct {
	binary      string
	machine     *simboot.Machine
	dir, socket string
	node        string
}

func newShipped(binary string, machine *simboot.Machine, dir, node string) *shipped {
	return &shipped{binary: binary, machine: machine, dir: dir, socket: filepath.Join(dir, "kms.sock"), node: node}
}

// configure writes a configuration with a separate state folder and TPM, and further
// lines of YAML.
func (k *shipped) configure(state, device string, more ...string) (path string, err error) {
	m := k.machine
	config := fmt.Sprintf(`apiVersion: kleidi.beezy.dev/v1alpha1
kind: KleidiConfiguration
node: %s
state: {dir: %q}
tpm: {device: %q, eventLog: %q, userspaceEventLog: %q}
kms: {socket: %q}
admin: {socket: %q}
http: {socket: ""}
log: {format: json}
%s
`, k.node, filepath.Join(k.dir, state), device, m.EventLog(), m.UserspaceLog(), k.socket, filepath.Join(k.dir, "admin.sock"), strings.Join(more, "\n"))
	f, err := os.CreateTemp(k.dir, "config-*.yaml")
	if err != nil {
		return "", err
	}
	_, err = f.WriteString(config)
	return f.Name(), errors.Join(err, f.Close())
}

func (k *shipped) init(ctx context.Context, config string) error {
	identity, err := age.GenerateX25519Identity()
	if err != nil {
		return err
	}
	_, err = k.run(ctx, config, "init", "--recovery-recipient", identity.Recipient().String())
	return err
}

// run runs a verb, and returns its standard output.
func (k *shipped) run(ctx context.Context, config, verb string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, k.binary, append([]string{"--config", config, verb}, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("kleidi %s: %w\n%s%s", verb, err, out, stderr.Bytes())
	}
	return out, nil
}

// serve starts kleidi serve and waits for its first good Status. It returns the time at
// which the socket appeared, the durations of the steps in kleidi's log, the time of
// that Status, and the number of calls that were refused before it.
func (k *shipped) serve(ctx context.Context, config string) (p *plugin, s started, err error) {
	cmd := exec.Command(k.binary, "--config", config, "serve")
	log, err := os.Create(config + ".log")
	if err != nil {
		return nil, s, err
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	begin := time.Now()
	if err := cmd.Start(); err != nil {
		return nil, s, err
	}
	stop := func() { _ = cmd.Process.Signal(syscall.SIGTERM); _ = cmd.Wait() }
	exists := func() error { _, err := os.Stat(k.socket); return err }
	if err = until(ctx, startLimit, exists); err == nil {
		s.socket = time.Since(begin)
		err = until(ctx, startLimit, func() error {
			err := k.status(ctx)
			if err != nil {
				s.refused++
			}
			return err
		})
		s.status = time.Since(begin)
	}
	if err == nil {
		err = s.readLog(log.Name())
	}
	if err != nil {
		stop()
		said, _ := os.ReadFile(log.Name())
		return nil, s, fmt.Errorf("kleidi serve: %w\n%s", err, said)
	}
	return &plugin{name: "kleidi", socket: k.socket, pid: cmd.Process.Pid, stop: stop}, s, nil
}

// readLog reads the durations of the unlocking steps from kleidi's log.
func (s *started) readLog(log string) error {
	b, err := os.ReadFile(log)
	if err != nil {
		return err
	}
	for line := range bytes.Lines(b) {
		var record struct {
			Msg                string
			Gate, Slots, Total time.Duration
		}
		if json.Unmarshal(line, &record) == nil && record.Msg == "open" {
			s.gate, s.slots, s.rest = record.Gate, record.Slots, record.Total-record.Gate-record.Slots
			return nil
		}
	}
	return errors.New("the log does not say that it is open")
}

// until repeats f, a thousand times a second, until it succeeds.
func until(ctx context.Context, limit time.Duration, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
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
