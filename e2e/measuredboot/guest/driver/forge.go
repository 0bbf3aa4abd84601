package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/beezy-dev/kleidi/e2e/measuredboot/guest/wire"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/recovery"
)

// forge writes a consistent keyring: it has the real keyring's cluster ID and nodes and
// a higher revision, and its TPM slots open on this machine. Only its KEK is the
// attacker's.
func forge(f wire.Forge) error {
	ours, err := parse(f.Real)
	if err != nil {
		return err
	}
	own, err := parse(f.Own)
	if err != nil {
		return err
	}
	kek, err := openWith(f.Identity, own.Slots())
	if err != nil {
		return err
	}
	k, err := keyring.New(ours.ClusterID(), kek, own.Slots(), ours.Info().Nodes, time.Now())
	if err != nil {
		return err
	}
	later, err := k.AtLeast(ours.Revision() + 1000)
	if err != nil {
		return err
	}
	return os.WriteFile(f.Real, later.Marshal(), 0o600)
}

func parse(path string) (*keyring.Untrusted, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return keyring.Parse(b)
}

func openWith(identity string, slots []seal.Slot) (*seal.Secret, error) {
	secret, err := seal.Memory{}.Take([]byte(identity))
	if err != nil {
		return nil, err
	}
	w, err := recovery.NewOpener(seal.Memory{}, secret)
	if err != nil {
		return nil, err
	}
	for _, s := range slots {
		if s.Type == seal.TypeRecovery {
			return w.Unwrap(context.Background(), s)
		}
	}
	return nil, fmt.Errorf("there is no recovery slot")
}
