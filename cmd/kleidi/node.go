package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"

	"github.com/beezy-dev/kleidi/hsm"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/recovery"
	"github.com/beezy-dev/kleidi/seal/rotation"
	"github.com/beezy-dev/kleidi/seal/store"
	"github.com/beezy-dev/kleidi/seal/unlock"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
	"github.com/beezy-dev/kleidi/tpm/bootrule"
	"github.com/beezy-dev/kleidi/tpm/nv"
	"github.com/beezy-dev/kleidi/vault"
)

// node is this machine, put together from its configuration. Making one touches
// neither disk nor TPM.
type node struct {
	cfg      *config.Config
	log      *slog.Logger
	mem      seal.Memory
	state    *state
	keyring  lockedFile
	anchor   unlock.Anchor
	gate     *attest.Gate
	tpm      *tpm.Wrapper
	remote   *remoteGate
	hsm      *hsm.Wrapper   // nil where no token is configured
	vault    *vault.Wrapper // nil where no server is configured
	unlocker *unlock.Unlocker

	replacing sync.Mutex // see replace
	tests     selfTests
}

func newNode(cfg *config.Config, log *slog.Logger, attempted func(seal.Cause, unlock.Timing)) (*node, error) {
	addr, err := tpm.ParseAddress(cfg.TPM.Device)
	if err != nil {
		return nil, fmt.Errorf("tpm.device: %w", err)
	}
	owner := tpm.Owner{File: cfg.TPM.OwnerAuthFile}
	counter, err := nv.NewCounter(cfg.TPM.EpochIndex, owner)
	if err != nil {
		return nil, fmt.Errorf("tpm.epochIndex: %w", err)
	}
	device := tpm.NewDevice(addr, cfg.TPM.Timeout)
	n := &node{cfg: cfg, log: log, mem: memory(cfg), state: &state{dir: cfg.State.Dir}}
	n.keyring = lockedFile{store.NewFile(cfg.Keyring()).Keep(parses), n.state}
	n.anchor = unlock.FileAnchor{Store: lockedFile{store.NewFile(cfg.AnchorPath()).Formerly("pin.json"), n.state}}
	if cfg.Anchor.Store == config.AnchorTPM {
		index, err := nv.NewAnchor(cfg.Anchor.Index, owner)
		if err != nil {
			return nil, fmt.Errorf("anchor.index: %w", err)
		}
		n.anchor = tpmAnchor{&nv.AnchorStore{Anchor: index, Device: device, Owner: owner, Bank: cfg.Bank(), PCRs: cfg.Anchor.PCRs, Holds: n.anchorable}}
	}
	n.gate = &attest.Gate{
		Attester: attest.Attester{Device: device, Owner: owner,
			Logs: attest.Logs{Firmware: cfg.TPM.EventLog, Userspace: cfg.TPM.UserspaceEventLog}},
		Node: cfg.Node, Counter: counter, Bank: cfg.Bank(), PCRs: cfg.TPM.PCRs, Phase: cfg.TPM.Phase, Always: cfg.Unlock.RequireAttestation,
	}
	if cfg.TPM.AnySignedBoot {
		n.gate.AnySigned = func(b bootrule.Binding) {
			log.Warn("sealing to less than the whole boot, as tpm.anySignedBoot allows", "open", b.Describe(), "pcrs", b.PCRs)
		}
	}
	if cfg.TPM.BootPolicy != "" {
		n.gate.BootPolicy = func() (*bootpolicy.BootPolicy, error) { return readPolicy(cfg.TPM.BootPolicy) }
	}
	n.remote, err = newRemoteGate(cfg, n.gate.Logs.Explaining)
	if err != nil {
		return nil, err
	}
	n.tpm = tpm.NewWrapper(tpm.Config{
		Device: device, Owner: owner, Counter: counter, Memory: n.mem, Node: cfg.Node, State: n.gate.State, Signed: n.signed,
	})
	if n.remote != nil {
		n.tpm.Ask = n.remote.Ask
	}
	if err := n.addSecondary(); err != nil {
		return nil, err
	}
	n.unlocker = unlock.New(unlock.Config{
		Store: n.keyring, Anchor: n.anchor, Ready: n.ready, Gate: preflight{n.gate, n.attests()}, Ungated: n.ungated, Wrappers: n.openers(),
		Settle: n.settle, Log: log, Attempted: attempted,
	})
	return n, nil
}

// addSecondary makes the wrappers beside the TPM's that are configured.
func (n *node) addSecondary() (err error) {
	if n.cfg.PKCS11.Configured() {
		if n.hsm, err = hsm.New(n.cfg.PKCS11.Wrapper(n.mem, n.sealedPIN)); err != nil {
			return fmt.Errorf("pkcs11: %w", err)
		}
	}
	if n.cfg.Vault.Address != "" {
		if n.vault, err = vault.New(n.cfg.Vault.Wrapper(n.mem, n.clientCertificate)); err != nil {
			return err
		}
	}
	return nil
}

// opensWithTPM reports whether the TPM is among what may open the keyring.
func (n *node) opensWithTPM() bool {
	return slices.Contains(n.cfg.Unlock.Order, seal.TypeTPM) || n.needsBoth() != ""
}

// ungated reports whether a wrapper needs no attestation: one without the TPM, where
// the configuration says so.
func (n *node) ungated(kind string) bool {
	return !n.cfg.Unlock.RequireAttestation && kind != seal.TypeTPM && twoOfTwo(kind) == ""
}

// settle ends the epochs before that of these slots.
func (n *node) settle(ctx context.Context, slots []seal.Slot) error {
	return n.tpm.Settle(ctx, halves(slots))
}

// attests reports whether this machine has a TPM to attest it.
func (n *node) attests() bool { return n.opensWithTPM() || n.cfg.Unlock.RequireAttestation }

// wrapper returns the configured wrapper of a type, or nil.
func (n *node) wrapper(kind string) seal.Wrapper {
	switch {
	case kind == seal.TypeTPM:
		return n.tpm
	case kind == seal.TypePKCS11 && n.hsm != nil:
		return n.hsm
	case kind == seal.TypeVault && n.vault != nil:
		return n.vault
	case twoOfTwo(kind) != "":
		if w := n.together(kind, n.tpm); w != nil {
			return w
		}
	}
	return nil
}

// wrappers returns all that are configured, whether they may open at start or not.
func (n *node) wrappers() []seal.Wrapper {
	var all []seal.Wrapper
	for _, kind := range []string{seal.TypeTPM, seal.TypePKCS11, seal.TypeVault, seal.TypeTPMAndPKCS11, seal.TypeTPMAndVault} {
		if w := n.wrapper(kind); w != nil && (kind != seal.TypeTPM || n.opensWithTPM()) {
			all = append(all, w)
		}
	}
	return all
}

// own takes the state folder for this process, before it changes anything, and
// keeps the process out of swap, before it holds anything secret.
func (n *node) own() error {
	if err := n.ready(); err != nil {
		return err
	}
	err := n.state.acquire()
	if errors.Is(err, store.ErrLocked) {
		return fmt.Errorf("%w; nothing answers on %s: see that both use the same configuration", err, n.cfg.Admin.Socket)
	}
	if err != nil {
		return seal.Errorf(seal.CauseStore, "see state.dir and its disk", "the state folder can't be changed: %w", err)
	}
	return nil
}

func parses(b []byte) bool {
	_, err := keyring.Parse(b)
	return err == nil
}

func (n *node) close() {
	n.unlocker.Close()
	if n.vault != nil {
		_ = n.vault.Close()
	}
	n.state.release()
}

// stored returns the stored keyring, of which nothing is proven.
func (n *node) stored(ctx context.Context) (*keyring.Untrusted, store.Version, error) {
	b, version, err := n.keyring.File.Load(ctx)
	if err != nil {
		return nil, "", keyringMissing(err)
	}
	u, err := keyring.Parse(b)
	return u, version, err
}

// rewrappers are the wrappers that rotation follows slots with.
func (n *node) rewrappers() []rotation.Rewrapper {
	all := []rotation.Rewrapper{n.tpm, recovery.Rewrapper{Memory: n.mem}, skipped{}}
	if n.hsm != nil {
		all = append(all, n.hsm)
	}
	if n.vault != nil {
		all = append(all, n.vault)
	}
	if kind := n.needsBoth(); kind != "" {
		all = append(all, n.together(kind, n.tpm))
	}
	return all
}

// ready is the check that nothing secret can reach the swap.
func (n *node) ready() error { return lockProcess(n.mem, n.log) }

// preflight is the gate, which takes two of two apart.
type preflight struct {
	*attest.Gate
	attests bool // there is a TPM to attest with
}

// Attest implements unlock.Gate.
func (p preflight) Attest(ctx context.Context, slots []seal.Slot) error {
	if !p.attests {
		return nil
	}
	err := p.Gate.Attest(ctx, halves(slots))
	if o, ok := errors.AsType[unlock.Overruled](err); ok {
		return halved{o}
	}
	return err
}

// openers are the wrappers that may open the keyring at start, in their order.
func (n *node) openers() []seal.Wrapper {
	var all []seal.Wrapper
	for _, kind := range n.cfg.Unlock.Order {
		if w := n.wrapper(kind); w != nil {
			all = append(all, w)
		}
	}
	return all
}
