package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/nv"
	"github.com/beezy-dev/kleidi/tpm/simboot"
)

// rings are the keyrings whose size and start are compared with the first.
var rings = []struct{ nodes, retired int }{{1, 0}, {3, 0}, {50, 0}, {1, manyRetired}, {50, manyRetired}}

// printNodes compares starts by the number of nodes and of retired KEKs, in turns. All
// nodes but this one are simulated: they are entries with the size of a real one's.
func (k *shipped) printNodes(ctx context.Context, config string, n int) error {
	configs := []string{config}
	states := []string{"state"}
	for _, r := range rings[1:] {
		state := fmt.Sprintf("state-%d-nodes-%d-retired", r.nodes, r.retired)
		if err := k.makeNodes(ctx, state, r.nodes, r.retired); err != nil {
			return fmt.Errorf("a keyring of %d nodes: %w", r.nodes, err)
		}
		config, err := k.configure(state, k.machine.Device())
		if err != nil {
			return err
		}
		states, configs = append(states, state), append(configs, config)
	}
	all, err := k.starts(ctx, 2*n, configs...)
	if err != nil {
		return err
	}
	fmt.Printf("by nodes and retired KEKs, in turns, medians of %d starts, and their ratio to one node without\n", 2*n)
	fmt.Printf("%8s %8s  %18s  %20s  %20s  %20s\n", "nodes", "retired", "keyring KB", "KEK unsealed in ms", "read and opened ms", "first good Status ms")
	var first [4]float64
	for i, r := range rings {
		info, err := os.Stat(filepath.Join(k.dir, states[i], "keyring.json"))
		if err != nil {
			return err
		}
		took := func(of func(started) time.Duration) float64 { return inMS(medianTime(all[i], of)) }
		row := [4]float64{float64(info.Size()) / 1e3, took(func(s started) time.Duration { return s.slots }),
			took(func(s started) time.Duration { return s.rest }), took(func(s started) time.Duration { return s.status })}
		if i == 0 {
			first = row
		}
		fmt.Printf("%8d %8d", r.nodes, r.retired)
		for j, v := range row {
			fmt.Printf("  %8.1f (× %6.2f)", v, v/first[j])
		}
		fmt.Println()
	}
	fmt.Println()
	return nil
}

// makeNodes makes a state folder whose keyring is in format 2 and has this many nodes
// and retired KEKs.
func (k *shipped) makeNodes(ctx context.Context, state string, nodes, retired int) error {
	return k.makeKeyring(ctx, state, func(w *tpm.Wrapper, ring *keyring.Keyring, slot seal.Slot) (*keyring.Keyring, error) {
		ring, err := rotatedOften(ctx, w, ring, slot, retired)
		if err != nil {
			return nil, err
		}
		self, err := w.Self(ctx)
		if err != nil {
			return nil, err
		}
		entry := keyring.Node{Name: k.node, EK: self.EK, SRK: self.SRK, EpochIndex: uint32(nv.DefaultEpochIndex), Added: time.Now()}
		if ring, err = replaced(ring)(ring.Upgrade(entry)); err != nil {
			return nil, err
		}
		for i := range nodes - 1 {
			digest := sha256.Sum256(fmt.Append(nil, i))
			entry.Name, entry.EK = fmt.Sprint("simulated-", i), fmt.Sprintf("sha256:%x", digest)
			// A different key: the public area ends with a coordinate.
			entry.SRK = append(self.SRK[:len(self.SRK)-len(digest):len(self.SRK)-len(digest)], digest[:]...)
			if ring, err = replaced(ring)(ring.WithNode(entry, time.Now())); err != nil {
				return nil, err
			}
		}
		return ring, nil
	})
}

// replaced closes a keyring once another one has taken its place.
func replaced(ring *keyring.Keyring) func(*keyring.Keyring, error) (*keyring.Keyring, error) {
	return func(next *keyring.Keyring, err error) (*keyring.Keyring, error) {
		ring.Close()
		return next, err
	}
}

// printJoins compares a join of a second machine with kleidi init on that machine, in
// turns. Both end with a keyring that is sealed, and opened again.
func (k *shipped) printJoins(ctx context.Context, n int) error {
	joiner, err := k.secondMachine(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = joiner.machine.PowerOff() }()
	seat, err := k.startSeat(ctx)
	if err != nil {
		return err
	}
	defer seat.stop()
	config, err := joiner.configure("state", joiner.machine.Device())
	if err != nil {
		return err
	}
	var joins, inits []started
	for range n {
		init, err := joiner.fromNothing(func() error { return joiner.init(ctx, config) })
		if err != nil {
			return err
		}
		command, err := seat.approve(ctx, joiner, config)
		if err != nil {
			return err
		}
		join, err := joiner.fromNothing(func() error {
			_, err := joiner.run(ctx, config, "join", command...)
			return err
		})
		if err != nil {
			return err
		}
		joins, inits = append(joins, started{status: join}), append(inits, started{status: init})
	}
	whole := func(s started) time.Duration { return s.status }
	a, b := inMS(medianTime(joins, whole)), inMS(medianTime(inits, whole))
	fmt.Printf("kleidi join against kleidi init on the same machine, in turns, medians of %d: %.0f / %.0f ms = %.2f; raw", n, a, b, a/b)
	for i := range joins {
		fmt.Printf(" %.0f/%.0f", inMS(joins[i].status), inMS(inits[i].status))
	}
	fmt.Print("\n\n")
	return nil
}

// fromNothing returns the duration of f on a machine without a state folder.
func (k *shipped) fromNothing(f func() error) (time.Duration, error) {
	if err := os.RemoveAll(filepath.Join(k.dir, "state")); err != nil {
		return 0, err
	}
	begin := time.Now()
	err := f()
	return time.Since(begin), err
}

// secondMachine boots another machine, as the first one did.
func (k *shipped) secondMachine(ctx context.Context) (*shipped, error) {
	dir := filepath.Join(k.dir, "second")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	machine, err := simboot.New(filepath.Join(dir, "machine"))
	if err != nil {
		return nil, err
	}
	return newShipped(k.binary, machine, dir, "bench-2"), machine.Boot(ctx, simboot.Baseline(simboot.UKI))
}

// seat is a node that serves, and answers joining machines.
type seat struct {
	*shipped
	config, policy string
	stop           func()
}

// startSeat serves a keyring of this machine's own.
func (k *shipped) startSeat(ctx context.Context) (*seat, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	address := l.Addr().String()
	config, err := k.configure("state-seat", k.machine.Device(), "join: {listen: "+address+"}", "audit: {file: "+filepath.Join(k.dir, "audit.log")+"}")
	if err = errors.Join(err, l.Close()); err != nil {
		return nil, err
	}
	s := &seat{shipped: k, config: config, policy: filepath.Join(k.dir, "policy.yaml")}
	if err = k.init(ctx, config); err == nil {
		_, err = k.run(ctx, config, "bootpolicy", "record", "--file", s.policy)
	}
	if err != nil {
		return nil, err
	}
	p, _, err := k.serve(ctx, config)
	if err != nil {
		return nil, err
	}
	s.stop = p.stop
	return s, nil
}

// approve approves a machine, and returns the arguments of the printed kleidi join.
func (s *seat) approve(ctx context.Context, joiner *shipped, config string) ([]string, error) {
	out, err := joiner.run(ctx, config, "node", "identity", "-o", "json")
	if err != nil {
		return nil, err
	}
	var identity struct{ EK string }
	if err := json.Unmarshal(out, &identity); err != nil {
		return nil, err
	}
	out, err = s.run(ctx, s.config, "node", "approve", joiner.node, "--ek", identity.EK, "--boot-policy", s.policy)
	if err != nil {
		return nil, err
	}
	_, command, ok := strings.Cut(string(out), "kleidi join ")
	if !ok {
		return nil, fmt.Errorf("kleidi node approve prints no command: %s", out)
	}
	command, _, _ = strings.Cut(command, "\n")
	return strings.Fields(command), nil
}

// printWrapping measures the work of a rotation's driver, which makes the slots of a fresh
// KEK for one boot state of each node, and compares many nodes with one. The nodes are
// simulated: each has this machine's storage root key.
func printWrapping(ctx context.Context, w *tpm.Wrapper, gate *attest.Gate) error {
	peer, err := w.Self(ctx)
	if err != nil {
		return err
	}
	state, err := gate.State(ctx)
	if err != nil {
		return err
	}
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		return err
	}
	defer kek.Close()
	var one time.Duration
	fmt.Printf("a fresh KEK wrapped for all nodes of a rotation, median of %d, and the ratio to one node:", tpmRuns)
	for _, nodes := range []int{1, 3, 50} {
		took, err := medianOf(func() error {
			for range nodes {
				if _, err := tpm.WrapFor(peer, kek, state, 1); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		if nodes == 1 {
			one = took
		}
		fmt.Printf(" %d: %.1f ms (× %.1f);", nodes, inMS(took), took.Seconds()/one.Seconds())
	}
	fmt.Print("\n\n")
	return nil
}
