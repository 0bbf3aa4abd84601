package node

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"

	"github.com/beezy-dev/kleidi/grpcserver/kmsplugin"
	"github.com/beezy-dev/kleidi/hsm"
	"github.com/beezy-dev/kleidi/internal/clusteraccess"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/slotrecord"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/store"
	"github.com/beezy-dev/kleidi/seal/unlock"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
	"github.com/beezy-dev/kleidi/tpm/bootrule"
	"github.com/beezy-dev/kleidi/tpm/device"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/nv"
	"github.com/beezy-dev/kleidi/vault"
)

// New puts this machine together from its configuration. Attempted, unless it is nil, is
// called after each attempt to open the keyring.
func New(cfg *config.Config, log *slog.Logger, attempted func(seal.Cause, unlock.Timing)) (*Node, error) {
	addr, err := device.ParseAddress(cfg.TPM.Device)
	if err != nil {
		return nil, fmt.Errorf("tpm.device: %w", err)
	}
	owner := keys.Owner{File: cfg.TPM.OwnerAuthFile}
	counter, err := nv.NewCounter(cfg.TPM.EpochIndex, owner)
	if err != nil {
		return nil, fmt.Errorf("tpm.epochIndex: %w", err)
	}
	device := device.New(addr, cfg.TPM.Timeout)
	n := &Node{View: slotview.Reader{Node: cfg.Node, Order: cfg.Unlock.Order, Counter: counter}, Config: cfg, Log: log, Memory: MemoryOf(cfg), State: &StateFolder{dir: cfg.State.Dir}}
	n.Keyring = LockedFile{store.NewFile(cfg.Keyring()).Keep(parses), n.State}
	if n.Anchor, err = anchorOf(n, device, owner); err != nil {
		return nil, err
	}
	n.Gate = newGate(cfg, log, attest.Attester{
		Device: device, Owner: owner, AK: attest.AKFile(filepath.Join(cfg.State.Dir, "ak.json")),
		Logs: attest.Logs{Firmware: cfg.TPM.EventLog, Userspace: cfg.TPM.UserspaceEventLog},
	}, counter)
	n.Access = &clusteraccess.Access{Node: cfg.Node, Kubeconfig: cfg.Kubeconfig(), Gate: n.Gate}
	n.Remote, err = newRemoteGate(cfg, n.Gate.Logs.Explaining)
	if err != nil {
		return nil, err
	}
	n.TPM = tpm.NewWrapper(tpm.Config{
		Device: device, Owner: owner, Counter: counter, Memory: n.Memory, Node: cfg.Node, State: n.Gate.State, Signed: n.signed,
	})
	if n.Remote != nil {
		n.TPM.Ask = n.Remote.Ask
	}
	if err := n.addSecondary(); err != nil {
		return nil, err
	}
	n.Slots = slotrecord.New(readFreely{n.State.File(cfg.SlotRecord())}, n.View, log)
	c := unlock.Config{
		Store: n.Keyring, Anchor: n.Anchor, Ready: n.LockMemory, Gate: preflight{n.Gate, n.Attests()}, Ungated: n.ungated, Wrappers: n.Openers(),
		Hold: device.Hold, Settle: n.settle, WrapStaged: wrapStaged(n), Witness: n.Slots, Log: log, Attempted: attempted,
	}
	if cfg.Cluster.Kubeconfig != "" {
		c.Commit = func(ctx context.Context, old, next *keyring.Keyring) error { return n.Replica.Commit(ctx, old, next) }
	}
	n.Unlocker = unlock.New(c)
	if cfg.Cluster.Kubeconfig != "" {
		s := n.Access.Store()
		n.Replica, n.Archives = replicaOver(n, s), s
	}
	return n, nil
}

// anchorOf returns the anchor that anchor.store names: a file, or a place in the TPM.
func anchorOf(n *Node, device *device.Device, owner keys.Owner) (unlock.Anchor, error) {
	cfg := n.Config
	if cfg.Anchor.Store != config.AnchorTPM {
		return unlock.FileAnchor{Store: LockedFile{store.NewFile(cfg.AnchorPath()).Formerly("pin.json"), n.State}}, nil
	}
	index, err := nv.NewAnchor(cfg.Anchor.Index, owner)
	if err != nil {
		return nil, fmt.Errorf("anchor.index: %w", err)
	}
	return tpmAnchor{&nv.AnchorStore{Anchor: index, Device: device, Owner: owner, Bank: cfg.Bank(), PCRs: cfg.Anchor.PCRs, Holds: n.CheckAnchorable}}, nil
}

// newGate returns the gate that this machine's boot must pass.
func newGate(cfg *config.Config, log *slog.Logger, attester attest.Attester, counter *nv.Counter) *attest.Gate {
	g := &attest.Gate{
		Attester: attester,
		Node:     cfg.Node, Counter: counter, Bank: cfg.Bank(), PCRs: cfg.TPM.PCRs, Phase: cfg.TPM.Phase, Always: cfg.Unlock.RequireAttestation,
	}
	if cfg.TPM.AnySignedBoot {
		g.AnySigned = func(b bootrule.Binding) {
			log.Warn("sealing to less than the whole boot, as tpm.anySignedBoot allows", "open", b.Describe(), "pcrs", b.PCRs)
		}
	}
	if cfg.TPM.BootPolicy != "" {
		g.BootPolicyFile = cfg.TPM.BootPolicy
		g.BootPolicy = func() (*bootpolicy.BootPolicy, error) { return files.ReadBootPolicy(cfg.TPM.BootPolicy) }
	}
	return g
}

// addSecondary makes the configured wrappers other than the TPM's.
func (n *Node) addSecondary() (err error) {
	if n.Config.PKCS11.Configured() {
		if n.HSM, err = hsm.New(n.Config.PKCS11.Wrapper(n.Memory, n.sealedPIN)); err != nil {
			return fmt.Errorf("pkcs11: %w", err)
		}
	}
	if n.Config.Vault.Address != "" {
		if n.Vault, err = vault.New(n.Config.Vault.Wrapper(n.Memory, n.clientCertificate)); err != nil {
			return err
		}
	}
	if n.Config.KMSPlugin.Socket != "" {
		if n.KMSPlugin, err = kmsplugin.New(n.Config.KMSPlugin.Wrapper(n.Memory)); err != nil {
			return err
		}
	}
	return nil
}
