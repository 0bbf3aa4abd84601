package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/device"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/nv"
)

// manyRetired is the number of retired KEKs in the large keyring: one fewer than the
// limit.
const manyRetired = keyring.MaxRetired - 1

// printHistory compares starts with no retired KEK and with many, alternating.
func (k *shipped) printHistory(ctx context.Context, config string, n int) error {
	if err := k.makeHistory(ctx, "state-history"); err != nil {
		return fmt.Errorf("a keyring with retired KEKs: %w", err)
	}
	old, err := k.configure("state-history", k.machine.Device())
	if err != nil {
		return err
	}
	all, err := k.starts(ctx, 3*n, config, old)
	if err != nil {
		return err
	}
	fmt.Printf("\nwith %d retired KEKs and with none, in turns, medians of %d starts, ms\n", manyRetired, 3*n)
	for _, step := range steps {
		with, without := inMS(medianTime(all[1], step.of)), inMS(medianTime(all[0], step.of))
		fmt.Printf("%-29s %6.1f / %6.1f (%+.1f)\n", step.name, with, without, with-without)
	}
	fmt.Println()
	return nil
}

// makeHistory makes a state folder whose keyring was rotated often.
func (k *shipped) makeHistory(ctx context.Context, state string) error {
	return k.makeKeyring(ctx, state, func(w *tpm.Wrapper, ring *keyring.Keyring, slot seal.Slot) (*keyring.Keyring, error) {
		return rotatedOften(ctx, w, ring, slot, manyRetired)
	})
}

// makeKeyring makes a state folder with the keyring that change makes from kleidi's
// keyring and its TPM slot. change closes the given keyring, or returns it.
func (k *shipped) makeKeyring(ctx context.Context, state string, change func(*tpm.Wrapper, *keyring.Keyring, seal.Slot) (*keyring.Keyring, error)) error {
	wrapper, err := k.wrapper()
	if err != nil {
		return err
	}
	b, err := os.ReadFile(filepath.Join(k.dir, "state", "keyring.json"))
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
	kek, err := wrapper.Unwrap(ctx, slot)
	if err != nil {
		return err
	}
	ring, err := stored.Open(kek, nil)
	if err != nil {
		return err
	}
	if ring, err = change(wrapper, ring, slot); err != nil {
		return err
	}
	defer ring.Close()
	folder := filepath.Join(k.dir, state)
	return errors.Join(os.Mkdir(folder, 0o700),
		os.WriteFile(filepath.Join(folder, "keyring.json"), ring.Marshal(), 0o600),
		os.WriteFile(filepath.Join(folder, "anchor.json"), ring.Anchor().Marshal(), 0o600))
}

// rotatedOften returns the keyring after a number of rotations, and closes the former one.
func rotatedOften(ctx context.Context, w *tpm.Wrapper, ring *keyring.Keyring, like seal.Slot, times int) (_ *keyring.Keyring, err error) {
	for range times {
		if ring, err = rotated(ctx, w, ring, like); err != nil {
			return nil, err
		}
	}
	return ring, nil
}

// rotated returns the keyring with another KEK, and closes the former one.
func rotated(ctx context.Context, w *tpm.Wrapper, ring *keyring.Keyring, like seal.Slot) (*keyring.Keyring, error) {
	defer ring.Close()
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		return nil, err
	}
	slot, err := w.WrapLike(ctx, kek, like)
	if err != nil {
		return nil, err
	}
	staged, err := ring.Stage(kek, []seal.Slot{slot}, time.Now())
	if err != nil {
		return nil, err
	}
	defer staged.Close()
	return staged.Activate(time.Now())
}

// wrapper returns the TPM's wrapper, as kleidi configures it.
func (k *shipped) wrapper() (*tpm.Wrapper, error) {
	addr, err := device.ParseAddress(k.machine.Device())
	if err != nil {
		return nil, err
	}
	counter, err := nv.NewCounter(nv.DefaultEpochIndex, keys.Owner{})
	if err != nil {
		return nil, err
	}
	return tpm.NewWrapper(tpm.Config{Device: device.New(addr, device.DefaultTimeout), Counter: counter, Node: k.node}), nil
}

func tpmSlot(stored *keyring.Untrusted) (seal.Slot, error) {
	slots := stored.Slots()
	i := slices.IndexFunc(slots, func(s seal.Slot) bool { return s.Type == seal.TypeTPM })
	if i < 0 {
		return seal.Slot{}, errors.New("the keyring holds no TPM slot")
	}
	return slots[i], nil
}
