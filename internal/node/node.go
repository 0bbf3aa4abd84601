package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/kmsplugin"
	"github.com/beezy-dev/kleidi/hsm"
	"github.com/beezy-dev/kleidi/internal/clusteraccess"
	"github.com/beezy-dev/kleidi/internal/config"
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
	Replica   *replica.Replica      // nil if no cluster store is configured
	Archives  Archives              // nil if no cluster store is configured
	Access    *clusteraccess.Access // to the API, whether or not it is configured

	Replacing sync.Mutex      // see lifecycle's replaceKeyring
	View      slotview.Reader // reads slots as this node does
	SelfTests SelfTests
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

// KeyringMissing gives fs.ErrNotExist the cause and the hint for a missing keyring.
func KeyringMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return seal.Errorf(seal.CauseKeyringMissing, unlock.HintMissing, "there is no keyring: %w", err)
	}
	return err
}

// NoteSpent reports the credentials that a command without serve has used up: the
// unwrapped secret exists only in its memory, and is lost when the command ends.
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
		return fmt.Errorf("%w; this command looks for that socket at %s: check that both use the same configuration", err, n.Config.Admin.Socket)
	}
	if err != nil {
		return seal.Caused(seal.CauseStore, "see state.dir and its disk", "the state folder can't be changed", err)
	}
	return nil
}

// settleTimeout bounds Close's wait for a token that answers no more.
const settleTimeout = 3 * time.Second

// Close locks the keyring, waits a moment for calls into PKCS#11 modules, and releases the
// state folder.
func (n *Node) Close() {
	n.Unlocker.Close()
	ctx, cancel := context.WithTimeout(context.Background(), settleTimeout)
	defer cancel()
	hsm.Settle(ctx)
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

// Advise returns err with hints that fit the open or stored keyring: without a recovery
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

// LockMemory keeps the process out of swap. If that fails while swap is on, the error has
// the cause seal.CauseMemory, unless memory.lock is best-effort.
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

// Wrappers returns every configured wrapper, whether or not it may open at start.
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

// Rewrappers are the wrappers that wrap a KEK like existing slots in a rotation.
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

// Archives are the archives of pruned KEKs in the cluster store, by key ID.
type Archives interface {
	// Archive returns the archive of a KEK; the error is fs.ErrNotExist if there is none.
	Archive(ctx context.Context, keyID string) ([]byte, error)
	// CreateArchive stores the archive of a KEK; the error is [store.ErrConflict] if
	// there is one already.
	CreateArchive(ctx context.Context, keyID string, archive []byte) error
}

// OpenSlots returns the slots of the open keyring, or none if kleidi is locked.
func (n *Node) OpenSlots() []seal.Slot {
	k, err := n.Unlocker.Keyring()
	if err != nil {
		return nil
	}
	return k.Slots()
}
