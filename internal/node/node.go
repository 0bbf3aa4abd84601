package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"

	"github.com/beezy-dev/kleidi/grpcserver/kmsplugin"
	"github.com/beezy-dev/kleidi/hsm"
	"github.com/beezy-dev/kleidi/internal/clusteraccess"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/slotrecord"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/both"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/recovery"
	"github.com/beezy-dev/kleidi/seal/replica"
	"github.com/beezy-dev/kleidi/seal/rotation"
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

// Node is this machine, put together from its configuration. New touches neither disk
// nor TPM.
type Node struct {
	Config    *config.Config
	Log       *slog.Logger
	Memory    seal.Memory
	State     *StateFolder
	Keyring   LockedFile
	Anchor    unlock.Anchor
	Gate      *attest.Gate
	TPM       *tpm.Wrapper
	Remote    *RemoteGate
	HSM       *hsm.Wrapper       // nil if no token is configured
	Vault     *vault.Wrapper     // nil if no server is configured
	KMSPlugin *kmsplugin.Wrapper // nil if no plugin is configured
	Unlocker  *unlock.Unlocker
	Slots     *slotrecord.Record
	Replica   *replica.Replica      // nil where no cluster store is configured
	Access    *clusteraccess.Access // to the API, whether or not it is configured

	Replacing sync.Mutex      // see lifecycle's replaceKeyring
	View      slotview.Reader // reads slots as this node does
	SelfTests SelfTests
}

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
	n.Anchor = unlock.FileAnchor{Store: LockedFile{store.NewFile(cfg.AnchorPath()).Formerly("pin.json"), n.State}}
	if cfg.Anchor.Store == config.AnchorTPM {
		index, err := nv.NewAnchor(cfg.Anchor.Index, owner)
		if err != nil {
			return nil, fmt.Errorf("anchor.index: %w", err)
		}
		n.Anchor = tpmAnchor{&nv.AnchorStore{Anchor: index, Device: device, Owner: owner, Bank: cfg.Bank(), PCRs: cfg.Anchor.PCRs, Holds: n.CheckAnchorable}}
	}
	n.Gate = &attest.Gate{
		Attester: attest.Attester{Device: device, Owner: owner, AK: attest.AKFile(filepath.Join(cfg.State.Dir, "ak.json")),
			Logs: attest.Logs{Firmware: cfg.TPM.EventLog, Userspace: cfg.TPM.UserspaceEventLog}},
		Node: cfg.Node, Counter: counter, Bank: cfg.Bank(), PCRs: cfg.TPM.PCRs, Phase: cfg.TPM.Phase, Always: cfg.Unlock.RequireAttestation,
	}
	if cfg.TPM.AnySignedBoot {
		n.Gate.AnySigned = func(b bootrule.Binding) {
			log.Warn("sealing to less than the whole boot, as tpm.anySignedBoot allows", "open", b.Describe(), "pcrs", b.PCRs)
		}
	}
	n.Access = &clusteraccess.Access{Node: cfg.Node, Kubeconfig: cfg.Kubeconfig(), Gate: n.Gate}
	if cfg.TPM.BootPolicy != "" {
		n.Gate.BootPolicyFile = cfg.TPM.BootPolicy
		n.Gate.BootPolicy = func() (*bootpolicy.BootPolicy, error) { return files.ReadBootPolicy(cfg.TPM.BootPolicy) }
	}
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
		n.Replica = replicaOver(n, &clusterStore{access: n.Access})
	}
	return n, nil
}

func parses(b []byte) bool {
	_, err := keyring.Parse(b)
	return err == nil
}

// Attest lets the gate judge this boot for these slots.
func (n *Node) Attest(ctx context.Context, slots []seal.Slot) error {
	return preflight{n.Gate, n.Attests()}.Attest(ctx, slots)
}

// preflight is the gate, which sees the parts of two-of-two slots.
type preflight struct {
	*attest.Gate
	attests bool // there is a TPM to attest with
}

// Attest implements unlock.Gate.
func (p preflight) Attest(ctx context.Context, slots []seal.Slot) error {
	if !p.attests {
		return nil
	}
	err := p.Gate.Attest(ctx, slotview.TPMParts(slots))
	if o, ok := errors.AsType[unlock.Overruled](err); ok {
		return overruledPart{o}
	}
	return err
}

func KeyringMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return seal.Errorf(seal.CauseKeyringMissing, unlock.HintMissing, "there is no keyring: %w", err)
	}
	return err
}

// NoteSpent says what a command without serve has used up: the unwrapped secret is only
// in its memory, and ends with it.
func (n *Node) NoteSpent(w io.Writer) {
	if n.Vault != nil && n.Vault.Unwrapped() {
		fmt.Fprintf(w, "note: the wrapping token in vault.auth.secretIDFile is spent, and the secret ID that it held ends with this command; put a new wrapping token into %s before kleidi serve starts, or the next command without it\n", n.Config.Vault.Auth.SecretIDFile)
	}
}

// MemoryOf hands out locked memory as configured.
func MemoryOf(c *config.Config) seal.Memory {
	return seal.Memory{BestEffort: c.Memory.Lock == config.LockBestEffort}
}

// TwoOfTwoWrapper returns the wrapper of a two-of-two with first as the TPM's wrapper.
func (n *Node) TwoOfTwoWrapper(kind string, first both.Part) *both.Wrapper {
	second, _ := n.Wrapper(slotview.Second(kind)).(both.Part)
	if second == nil {
		return nil
	}
	return &both.Wrapper{Kind: kind, Node: n.Config.Node, First: first, Second: second, Memory: n.Memory}
}

// overruledPart is a refusal that some slots overrule. It judges a two-of-two by the
// TPM's half.
type overruledPart struct{ unlock.Overruled }

// Overrules implements unlock.Overruled.
func (h overruledPart) Overrules(s seal.Slot) bool { return h.Overruled.Overrules(slotview.TPMPart(s)) }

// Unwrap returns the refusal.
func (h overruledPart) Unwrap() error { return h.Overruled }

// AcquireState takes the state folder for this process, before the process changes
// anything, and keeps the process out of swap, before it holds anything secret.
func (n *Node) AcquireState() error {
	if err := n.LockMemory(); err != nil {
		return err
	}
	err := n.State.acquire()
	if errors.Is(err, store.ErrLocked) {
		return fmt.Errorf("%w; nothing answers on %s: see that both use the same configuration", err, n.Config.Admin.Socket)
	}
	if err != nil {
		return seal.Caused(seal.CauseStore, "see state.dir and its disk", "the state folder can't be changed", err)
	}
	return nil
}

func (n *Node) Close() {
	n.Unlocker.Close()
	if n.Vault != nil {
		_ = n.Vault.Close()
	}
	n.State.Release()
}

// Stored returns the stored keyring. Nothing about it is proven.
func (n *Node) Stored(ctx context.Context) (*keyring.Untrusted, store.Version, error) {
	b, version, err := n.Keyring.File.Load(ctx)
	if err != nil {
		return nil, "", KeyringMissing(err)
	}
	u, err := keyring.Parse(b)
	return u, version, err
}

// Advise returns err for the operator of the open or stored keyring: without a recovery
// slot, no hint mentions a recovery identity.
func (n *Node) Advise(ctx context.Context, err error) error {
	if err == nil || seal.WithoutRecovery(err) == err {
		return err
	}
	slots := n.OpenSlots()
	if slots == nil {
		u, _, storeErr := n.Stored(ctx)
		if storeErr != nil {
			return err
		}
		slots = u.Slots()
	}
	if slices.ContainsFunc(slots, func(s seal.Slot) bool { return s.Type == seal.TypeRecovery }) {
		return err
	}
	return seal.WithoutRecovery(err)
}

// LockMemory ensures that nothing secret can reach the swap.
func (n *Node) LockMemory() error { return lockProcess(n.Memory, n.Log) }

// Openers are the wrappers that may open the keyring at start, in their order.
func (n *Node) Openers() []seal.Wrapper {
	var all []seal.Wrapper
	for _, kind := range n.Config.Unlock.Order {
		if w := n.Wrapper(kind); w != nil {
			all = append(all, w)
		}
	}
	return all
}

// Wrappers returns every configured wrapper, whether it may open at start or not.
func (n *Node) Wrappers() []seal.Wrapper {
	var all []seal.Wrapper
	for _, kind := range []string{seal.TypeTPM, seal.TypePKCS11, seal.TypeVault, seal.TypeKMSPlugin, seal.TypeTPMAndPKCS11, seal.TypeTPMAndVault, seal.TypeTPMAndKMSPlugin} {
		if w := n.Wrapper(kind); w != nil && (kind != seal.TypeTPM || n.View.OpensWithTPM()) {
			all = append(all, w)
		}
	}
	return all
}

// Wrapper returns the configured wrapper of a type, or nil.
func (n *Node) Wrapper(kind string) seal.Wrapper {
	switch {
	case kind == seal.TypeTPM:
		return n.TPM
	case slotview.Second(kind) != "":
		if w := n.TwoOfTwoWrapper(kind, n.TPM); w != nil {
			return w
		}
	}
	for _, w := range secondary(n) {
		if w.Type() == kind {
			return w
		}
	}
	return nil
}

// secondary returns the configured wrappers other than the TPM's.
func secondary(n *Node) (all []both.Part) {
	if n.HSM != nil {
		all = append(all, n.HSM)
	}
	if n.Vault != nil {
		all = append(all, n.Vault)
	}
	if n.KMSPlugin != nil {
		all = append(all, n.KMSPlugin)
	}
	return all
}

// Rewrappers are the wrappers with which a rotation follows slots.
func (n *Node) Rewrappers() []rotation.Rewrapper {
	all := []rotation.Rewrapper{n.TPM, recovery.Rewrapper{Memory: n.Memory}, slotview.KeepMissing{}}
	for _, w := range secondary(n) {
		all = append(all, w)
	}
	if kind := n.View.TwoOfTwo(); kind != "" {
		all = append(all, n.TwoOfTwoWrapper(kind, n.TPM))
	}
	return all
}

// Attests reports whether this machine has a TPM to attest it.
func (n *Node) Attests() bool { return n.View.OpensWithTPM() || n.Config.Unlock.RequireAttestation }

// settle ends the epochs before the epoch of these slots.
func (n *Node) settle(ctx context.Context, slots []seal.Slot) error {
	return n.TPM.Settle(ctx, slotview.TPMParts(slots))
}

// Refuse makes this machine's TPM refuse kept copies of a slot, see
// [tpm.Wrapper.Refuse].
func (n *Node) Refuse(ctx context.Context, c tpm.Copies) error {
	counter, err := nv.NewCounter(c.Index, keys.Owner{File: n.Config.TPM.OwnerAuthFile})
	if err != nil {
		return err
	}
	return n.TPM.Refuse(ctx, c, counter)
}

// ungated reports whether a wrapper needs no attestation: a wrapper without the TPM, if
// the configuration allows it.
func (n *Node) ungated(kind string) bool {
	return !n.Config.Unlock.RequireAttestation && kind != seal.TypeTPM && slotview.Second(kind) == ""
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
