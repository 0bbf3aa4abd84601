package main

import (
	"context"
	"crypto"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/device"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/nv"
	"github.com/beezy-dev/kleidi/tpm/simboot"
)

// tpmRuns is how often each step is timed.
const tpmRuns = 21

// printTPM times the steps of unlocking on the swtpm, with the slot that kleidi made,
// and compares opening that slot with other wrappers.
func printTPM(ctx context.Context, o options, m *simboot.Machine, dir string) error {
	state := filepath.Join(dir, "state")
	b, err := os.ReadFile(filepath.Join(state, "keyring.json"))
	if err != nil {
		return err
	}
	stored, err := keyring.Parse(b)
	if err != nil {
		return err
	}
	slot, err := tpmSlot(stored)
	if err != nil {
		return err
	}
	addr, err := device.ParseAddress(m.Device())
	if err != nil {
		return err
	}
	counter, err := nv.NewCounter(nv.DefaultEpochIndex, keys.Owner{})
	if err != nil {
		return err
	}
	device := device.New(addr, device.DefaultTimeout)
	gate := &attest.Gate{
		Attester: attest.Attester{Device: device, Logs: attest.Logs{Firmware: m.EventLog(), Userspace: m.UserspaceLog()}},
		Node:     "bench", Counter: counter, Bank: crypto.SHA256,
	}
	wrapper := tpm.NewWrapper(tpm.Config{Device: device, Counter: counter, Node: "bench", State: gate.State})
	fmt.Printf("on swtpm, median of %d:", tpmRuns)
	for _, step := range []struct {
		name string
		run  func() error
	}{
		{"quote and event logs collected", func() error {
			_, err := gate.Attester.Collect(ctx, nil, make([]byte, 32), crypto.SHA256, []int{4, 7, 11})
			return err
		}},
		{"attested (that, and verified)", func() error { return gate.Attest(ctx, []seal.Slot{slot}) }},
		{"unsealed", func() error {
			kek, err := wrapper.Unwrap(ctx, slot)
			if err != nil {
				return err
			}
			return kek.Close()
		}},
	} {
		d, err := medianOf(step.run)
		if err != nil {
			return fmt.Errorf("%s: %w", step.name, err)
		}
		fmt.Printf(" %s %.1f ms;", step.name, d.Seconds()*1e3)
	}
	fmt.Print("\n\n")
	if err := printWrapping(ctx, wrapper, gate); err != nil {
		return err
	}
	if err := printRotations(ctx, wrapper, gate); err != nil {
		return err
	}
	return printOpening(ctx, o, dir, opener{"tpm, swtpm", func(ctx context.Context) (*seal.Secret, error) { return wrapper.Unwrap(ctx, slot) }})
}

func medianOf(f func() error) (time.Duration, error) {
	var took []time.Duration
	for range tpmRuns {
		begin := time.Now()
		if err := f(); err != nil {
			return 0, err
		}
		took = append(took, time.Since(begin))
	}
	slices.Sort(took)
	return took[len(took)/2], nil
}
