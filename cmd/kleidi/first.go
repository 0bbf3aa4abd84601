package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"time"

	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/recovery"
	"github.com/beezy-dev/kleidi/seal/rotation"
	"github.com/beezy-dev/kleidi/tpm/nv"
)

// initOptions is what init makes, and how.
type initOptions struct {
	// Recipients are age public keys to make the recovery slot for. Without any, an
	// identity is made, and Prompter hands it to the operator.
	Recipients []string
	// NoRecovery makes no recovery slot.
	NoRecovery bool
	// Import is the token of kleidi 1.x that wraps the KEK as well, or nil.
	Import *imported
	// GenerateKey has the configured token make its key first.
	GenerateKey bool
	// BreakTwoOfTwo lets the recovery slot open alone what unlock.order wants two
	// wrappers for.
	BreakTwoOfTwo bool
	Prompter      prompter
	// Progress is told of each step; nil tells nobody.
	Progress func(step string)
}

// prompter asks the person at the terminal.
type prompter interface {
	// ShowIdentity shows a recovery identity once. It refuses where it would stay on
	// this machine.
	ShowIdentity(identity *seal.Secret) error
	// AskIdentity asks for the identity back, without showing it.
	AskIdentity() ([]byte, error)
	// Tell says what went wrong before it asks again.
	Tell(message string)
}

// initResult is what init shows.
type initResult struct {
	ClusterID seal.ClusterID `json:"clusterID"`
	KeyID     seal.KeyID     `json:"keyID"`
	Keyring   string         `json:"keyring"`
	Node      string         `json:"node"`
	EK        string         `json:"ek,omitempty"` // where there is a TPM slot
	Slots     []string       `json:"slots"`
	// PKCS11 is what --import-config adds to the configuration.
	PKCS11 *importedToken `json:"pkcs11,omitempty"`
}

type importedToken struct {
	Module  string `json:"module"`
	URI     string `json:"uri"`
	PINFile string `json:"pinFile"`
}

// initialize makes the keyring. Until its last step nothing but the TPM's epoch
// counter exists, and a second init goes on from there. The anchor comes first: a
// keyring without an anchor would not be trusted, an anchor without a keyring is nothing.
func (n *node) initialize(ctx context.Context, opts initOptions) (*initResult, error) {
	if opts.Progress == nil {
		opts.Progress = func(string) {}
	}
	if opts.Import != nil {
		if err := n.takeOver(opts.Import); err != nil {
			return nil, err
		}
	}
	if n.remote != nil {
		return nil, errors.New("tpm.verifier is set, and no verifier knows this cluster yet; leave it out, and set it once the verifier has registered this node, see docs/remote-attestation.md")
	}
	if !opts.NoRecovery && !opts.BreakTwoOfTwo {
		if err := n.breaks(seal.TypeRecovery, nil); err != nil {
			return nil, err
		}
	}
	if err := n.own(); err != nil {
		return nil, err
	}
	if err := n.vacant(ctx); err != nil {
		return nil, err
	}
	if !opts.GenerateKey {
		return n.firstKeyring(ctx, opts)
	}
	if err := n.firstKey(ctx, opts); err != nil {
		return nil, err
	}
	r, err := n.firstKeyring(ctx, opts)
	if err != nil {
		err = keyMade(err)
	}
	return r, err
}

// firstKeyring makes the KEK, its slots and the keyring.
func (n *node) firstKeyring(ctx context.Context, opts initOptions) (*initResult, error) {
	kek, err := n.mem.NewKEK()
	if err != nil {
		return nil, err
	}
	defer kek.Close() // harmless after the keyring, which takes it, has closed it
	ek, slots, err := n.firstSlots(ctx, kek, opts)
	if err != nil {
		return nil, err
	}
	if err := rotation.Prove(ctx, kek, slots, n.wrappers()); err != nil {
		return nil, err
	}
	if !opts.NoRecovery {
		recoverySlot, err := n.makeRecovery(ctx, kek, opts)
		if err != nil {
			return nil, err
		}
		slots = append(slots, recoverySlot)
	}
	if opts.Import != nil { // only now: until here nothing is made that an operator who gives up would leave
		if err := opts.Import.keepPIN(); err != nil {
			return nil, err
		}
	}
	return n.saveFirst(ctx, kek, slots, ek, opts)
}

// firstSlots wraps the KEK by every wrapper that may open the keyring at start.
func (n *node) firstSlots(ctx context.Context, kek *seal.Secret, opts initOptions) (ek string, slots []seal.Slot, err error) {
	order := slices.Clone(n.cfg.Unlock.Order)
	if opts.Import != nil && !opts.Import.opens(order) {
		order = append(order, seal.TypePKCS11)
	}
	for _, kind := range order {
		var slot seal.Slot
		if kind == seal.TypeTPM || twoOfTwo(kind) != "" {
			ek, slot, err = n.firstTPM(ctx, kek, opts)
		} else {
			opts.Progress("wrapping a fresh KEK by " + kind)
			slot, err = n.wrapper(kind).Wrap(ctx, kek)
		}
		if err != nil {
			return "", nil, err
		}
		slots = append(slots, slot)
	}
	if !n.opensWithTPM() && n.attests() {
		err = n.gate.Attest(ctx, nil)
	}
	return ek, slots, err
}

// firstKey has the token make the key by which it wraps.
func (n *node) firstKey(ctx context.Context, opts initOptions) error {
	if n.hsm == nil || opts.Import != nil || !slices.ContainsFunc(n.cfg.Unlock.Order, func(kind string) bool { return kind == seal.TypePKCS11 || twoOfTwo(kind) == seal.TypePKCS11 }) {
		return errors.New("--generate-key is for a token that is configured, and that unlock.order names; set both, or run kleidi slot add pkcs11 --generate-key once the keyring is made")
	}
	opts.Progress("having the token make its key")
	_, err := n.hsm.GenerateKey(ctx)
	return err
}

// firstTPM seals the KEK to the running boot.
func (n *node) firstTPM(ctx context.Context, kek *seal.Secret, opts initOptions) (ek string, slot seal.Slot, err error) {
	opts.Progress("looking for the TPM at " + n.cfg.TPM.Device)
	if ek, err = n.tpm.Provision(ctx); err != nil {
		return "", slot, err
	}
	if err := n.firstPolicy(ctx, opts); err != nil {
		return "", slot, err
	}
	opts.Progress("attesting this boot, and sealing a fresh KEK to it")
	state, err := n.gate.State(ctx)
	if err != nil {
		return "", slot, err
	}
	if slot, err = n.wrapState(ctx, n.tpm, kek, state); err != nil {
		return "", slot, err
	}
	return ek, slot, n.anchorable(ctx)
}

// firstPolicy records the running boot as the boot policy, where the configuration
// names one and there is no such file yet.
func (n *node) firstPolicy(ctx context.Context, opts initOptions) error {
	path := n.cfg.TPM.BootPolicy
	if path == "" {
		return nil
	}
	if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	p, err := n.recordPolicy(ctx, nil)
	if err != nil {
		return err
	}
	opts.Progress("recording this boot as the boot policy " + path)
	return writeNew(path, p.Marshal())
}

// anchorable refuses an anchor in the TPM that another boot could write.
func (n *node) anchorable(ctx context.Context) error {
	if n.cfg.Anchor.Store != config.AnchorTPM {
		return nil
	}
	return n.gate.Holds(ctx, "write the anchor in the TPM", n.cfg.Anchor.PCRs, "bind the anchor to more with anchor.pcrs")
}

// vacant refuses to make a keyring where there is one, or was one: the previous
// revision may be all that is left of it.
func (n *node) vacant(ctx context.Context) error {
	_, _, err := n.keyring.Load(ctx)
	if err == nil {
		return fmt.Errorf("%s exists, and init never replaces a keyring; see kleidi status, or move the folder %s away if this is to be a new cluster", n.cfg.Keyring(), n.cfg.State.Dir)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	anchor, err := n.anchor.Load(ctx)
	if errors.Is(err, nv.ErrAnchorMissing) || errors.Is(err, nv.ErrAnchorUnwritten) {
		err = nil
	}
	if errors.Is(err, nv.ErrAnchorReplaced) {
		return fmt.Errorf("%w; or, if this is to be a new cluster: tpm2_nvundefine %#x", err, n.cfg.Anchor.Index)
	}
	if err != nil {
		return err
	}
	// An anchor of the first revision may also be what an init that was killed left.
	if _, err = n.keyring.Previous(ctx); errors.Is(err, fs.ErrNotExist) && (anchor == nil || anchor.Revision == 1) {
		return nil
	}
	return fmt.Errorf("%s is gone, and its previous revision or its anchor is still there; run kleidi keyring restore --previous, or move the folder %s away if this is to be a new cluster", n.cfg.Keyring(), n.cfg.State.Dir)
}

func (n *node) saveFirst(ctx context.Context, kek *seal.Secret, slots []seal.Slot, ek string, opts initOptions) (*initResult, error) {
	var cluster seal.ClusterID
	rand.Read(cluster[:])
	k, err := keyring.New(cluster, kek, slots, []keyring.Node{{Name: n.cfg.Node, EK: ek}}, time.Now())
	if err != nil {
		return nil, err
	}
	defer k.Close()
	opts.Progress("saving the keyring to " + n.cfg.Keyring())
	if err := n.anchor.Replace(ctx, k.Anchor()); err != nil {
		return nil, err
	}
	if _, err := n.keyring.Save(ctx, k.Marshal(), ""); err != nil {
		return nil, err
	}
	r := &initResult{ClusterID: cluster, KeyID: k.CurrentID(), Keyring: n.cfg.Keyring(), Node: n.cfg.Node, EK: ek}
	if opts.Import != nil {
		r.PKCS11 = &importedToken{opts.Import.token.Module, opts.Import.token.URI, opts.Import.token.PINFile}
	}
	for _, s := range slots {
		r.Slots = append(r.Slots, s.Type+": "+n.binding(s))
	}
	return r, nil
}

// makeRecovery wraps the KEK to the recipients, or to an identity made now.
func (n *node) makeRecovery(ctx context.Context, kek *seal.Secret, opts initOptions) (seal.Slot, error) {
	recipients := opts.Recipients
	var identity *seal.Secret
	if len(recipients) == 0 {
		var recipient string
		var err error
		if identity, recipient, err = recovery.GenerateIdentity(n.mem); err != nil {
			return seal.Slot{}, err
		}
		defer identity.Close()
		recipients = []string{recipient}
	}
	w, err := recovery.NewWrapper(n.mem, recipients)
	if err != nil {
		return seal.Slot{}, fmt.Errorf("--recovery-recipient: %w", err)
	}
	slot, err := w.Wrap(ctx, kek)
	if err == nil && identity != nil {
		err = n.handOver(ctx, opts.Prompter, identity, slot, kek)
	}
	return slot, err
}

// readBackTries is how often the identity may be mistyped.
const readBackTries = 3

// handOver shows the identity once, and opens the slot with what the operator
// gives back: an identity that nobody kept opens nothing.
func (n *node) handOver(ctx context.Context, p prompter, identity *seal.Secret, slot seal.Slot, kek *seal.Secret) error {
	if p == nil {
		return errors.New("nobody is there to keep the recovery identity; give --recovery-recipient")
	}
	if err := p.ShowIdentity(identity); err != nil {
		return err
	}
	for range readBackTries {
		given, err := p.AskIdentity()
		if err != nil {
			return notGivenBack(err)
		}
		if err = n.opens(ctx, given, slot, kek); err == nil {
			return nil
		}
		p.Tell(fmt.Sprintf("that does not open the recovery slot: %v", err))
	}
	return notGivenBack(fmt.Errorf("%d lines did not open the recovery slot", readBackTries))
}

func notGivenBack(err error) error {
	if errors.Is(err, io.EOF) {
		err = errors.New("the input ended")
	}
	return fmt.Errorf("the recovery identity was not given back: %w; nothing was made, run kleidi init again, or name --recovery-recipient age1…", err)
}

func (n *node) opens(ctx context.Context, identity []byte, slot seal.Slot, kek *seal.Secret) error {
	secret, err := n.mem.Take(identity)
	if err != nil {
		return err
	}
	defer secret.Close()
	w, err := recovery.NewOpener(n.mem, secret)
	if err != nil {
		return err
	}
	return rotation.Prove(ctx, kek, []seal.Slot{slot}, []seal.Wrapper{w})
}
