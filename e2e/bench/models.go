package main

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/tpm/device"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/slowtpm"
)

// printModels starts kleidi with other kinds of TPMs, and counts their commands.
func (k *shipped) printModels(ctx context.Context) error {
	path := filepath.Join(k.dir, "slow.sock")
	slow, err := slowtpm.Listen(path, strings.TrimPrefix(k.machine.Device(), "unix:"), slowtpm.Virtual)
	if err != nil {
		return err
	}
	defer slow.Close()
	config, err := k.configure("state", "unix:"+path)
	if err != nil {
		return err
	}
	fmt.Printf("a start by kind of TPM: commands, and the time to the first good Status, of which the first call waits for 2 s\n")
	fmt.Printf("%-34s %8s %14s %8s %14s %8s\n", "", "commands", "elliptic curve", "NV write", "ms to Status", "refused")
	for _, m := range []slowtpm.Model{slowtpm.Virtual, slowtpm.Fast, slowtpm.Slow} {
		if err := k.printModel(ctx, slow, config, m, ""); err != nil {
			return err
		}
	}
	if err := k.persistSRK(ctx); err != nil {
		return fmt.Errorf("persistent storage root key: %w", err)
	}
	if err := k.printModel(ctx, slow, config, slowtpm.Slow, ", persistent SRK"); err != nil {
		return err
	}
	fmt.Println()
	return nil
}

func (k *shipped) printModel(ctx context.Context, slow *slowtpm.TPM, config string, m slowtpm.Model, also string) error {
	slow.Use(m)
	slow.Take()
	p, s, err := k.serve(ctx, config)
	if err != nil {
		return fmt.Errorf("TPM %s: %w", m.Name, err)
	}
	p.stop()
	counts := slow.Take()
	all := 0
	for _, n := range counts {
		all += n
	}
	fmt.Printf("%-34s %8d %14d %8d %14.0f %8d\n", m.Name+also, all, counts[slowtpm.Curve], counts[slowtpm.Write], inMS(s.status), s.refused)
	return nil
}

// persistSRK keeps the storage root key in the TPM, as a provisioned TPM does.
func (k *shipped) persistSRK(ctx context.Context) error {
	addr, err := device.ParseAddress(k.machine.Device())
	if err != nil {
		return err
	}
	owner := tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Name: tpm2.HandleName(tpm2.TPMRHOwner), Auth: tpm2.PasswordAuth(nil)}
	return device.New(addr, device.DefaultTimeout).Do(ctx, func(t transport.TPM) error {
		return keys.WithSRK(t, keys.Owner{}, nil, func(srk *keys.SRK) error {
			_, err := tpm2.EvictControl{Auth: owner, ObjectHandle: &tpm2.NamedHandle{Handle: srk.Handle, Name: srk.Name}, PersistentHandle: 0x81000001}.Execute(t)
			return err
		})
	})
}
