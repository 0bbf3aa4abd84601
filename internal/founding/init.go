package founding

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"time"

	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/recovery"
	"github.com/beezy-dev/kleidi/seal/rotation"
	"github.com/beezy-dev/kleidi/tpm/nv"
)

// InitOptions says what init makes, and how.
type InitOptions struct {
	// Recipients are age public keys for the recovery slot. Without any, init makes an
	// identity, and Prompter hands it to the operator.
	Recipients []string
	// NoRecovery makes no recovery slot.
	NoRecovery bool
	// Import is the token of kleidi 1.x that also wraps the KEK, or nil.
	Import *Import
	// GenerateKey makes the configured token generate its key first.
	GenerateKey bool
	// BreakTwoOfTwo allows a recovery slot that alone opens the KEK, although
	// unlock.order demands two wrappers.
	BreakTwoOfTwo bool
	Prompter      Prompter
	// Progress receives each step; it may be nil.
	Progress func(step string)
}

// Prompter asks the person at the terminal.
type Prompter interface {
	// ShowIdentity shows a recovery identity once. It refuses if the identity would
	// stay on this machine.
	ShowIdentity(identity *seal.Secret) error
	// AskIdentity asks the operator to type the identity, without showing it.
	AskIdentity() ([]byte, error)
	// Tell shows a fault before the next question.
	Tell(message string)
}

// InitResult is the output of init.
type InitResult struct {
	ClusterID seal.ClusterID `json:"clusterID"`
	KeyID     seal.KeyID     `json:"keyID"`
	Keyring   string         `json:"keyring"`
	Node      string         `json:"node"`
	EK        string         `json:"ek,omitempty"` // if there is a TPM slot
	Slots     []string       `json:"slots"`
	// PKCS11 is what --import-config adds to the configuration.
	PKCS11 *TokenSettings `json:"pkcs11,omitempty"`
}

// Init makes the keyring. Until its last step only the TPM's epoch counter exists, and
// a second init continues from there. Init saves the anchor first: a keyring without an
// anchor would not be trusted, and an anchor without a keyring means nothing.
func Init(ctx context.Context, n *node.Node, opts InitOptions) (*InitResult, error) {
	if opts.Progress == nil {
		opts.Progress = func(string) {}
	}
	if opts.Import != nil {
		if err := useToken(n, opts.Import); err != nil {
			return nil, err
		}
	}
	if n.Remote != nil {
		return nil, errors.New("tpm.verifier is set, and no verifier knows this cluster yet; leave it out, and set it once the verifier has registered this node, see docs/remote-attestation.md")
	}
	if !opts.NoRecovery && !opts.BreakTwoOfTwo {
		if err := n.View.CheckAdd(seal.TypeRecovery, nil); err != nil {
			return nil, err
		}
	}
	if err := n.AcquireState(); err != nil {
		return nil, err
	}
	if err := checkVacant(ctx, n); err != nil {
		return nil, err
	}
	n.WarnTPM()
	n.WarnOwner(ctx)
	if !opts.GenerateKey {
		return firstKeyring(ctx, n, opts)
	}
	if err := firstKey(ctx, n, opts); err != nil {
		return nil, err
	}
	r, err := firstKeyring(ctx, n, opts)
	if err != nil {
		err = node.HintKeyMade(err)
	}
	return r, err
}

// checkVacant refuses to make a keyring if one exists or existed: the previous revision
// may be the only trace of it.
func checkVacant(ctx context.Context, n *node.Node) error {
	_, _, err := n.Keyring.Load(ctx)
	if err == nil {
		return fmt.Errorf("%s exists, and init never replaces a keyring; see kleidi status, or move the folder %s away if this is to be a new cluster", n.Config.Keyring(), n.Config.State.Dir)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	anchor, err := n.Anchor.Load(ctx)
	if errors.Is(err, nv.ErrAnchorMissing) || errors.Is(err, nv.ErrAnchorUnwritten) {
		err = nil
	}
	if errors.Is(err, nv.ErrAnchorReplaced) {
		return fmt.Errorf("%w; or, if this is to be a new cluster: tpm2_nvundefine %#x", err, n.Config.Anchor.Index)
	}
	if err != nil {
		return err
	}
	// An init that was killed may also leave an anchor of the first revision.
	if _, err = n.Keyring.Previous(ctx); errors.Is(err, fs.ErrNotExist) && (anchor == nil || anchor.Revision == 1) {
		return nil
	}
	return fmt.Errorf("%s is gone, and its previous revision or its anchor is still there; run kleidi keyring restore --previous, or move the folder %s away if this is to be a new cluster", n.Config.Keyring(), n.Config.State.Dir)
}

func saveFirst(ctx context.Context, n *node.Node, kek *seal.Secret, slots []seal.Slot, ek string, opts InitOptions) (*InitResult, error) {
	var cluster seal.ClusterID
	rand.Read(cluster[:])
	k, err := keyring.New(cluster, kek, slots, []keyring.Node{{Name: n.Config.Node, EK: ek}}, time.Now())
	if err != nil {
		return nil, err
	}
	defer k.Close()
	opts.Progress("saving the keyring to " + n.Config.Keyring())
	if err := n.Anchor.Replace(ctx, k.Anchor()); err != nil {
		return nil, err
	}
	if err := n.Slots.Begin(ctx, k); err != nil {
		return nil, err
	}
	if _, err := n.Keyring.Save(ctx, k.Marshal(), ""); err != nil {
		return nil, err
	}
	r := &InitResult{ClusterID: cluster, KeyID: k.CurrentID(), Keyring: n.Config.Keyring(), Node: n.Config.Node, EK: ek}
	if opts.Import != nil {
		r.PKCS11 = &TokenSettings{opts.Import.Token.Module, opts.Import.Token.URI, opts.Import.Token.PINFile}
	}
	for _, s := range slots {
		r.Slots = append(r.Slots, s.Type+": "+n.View.Binding(s))
	}
	return r, nil
}

// makeRecovery wraps the KEK to the recipients, or to a new identity.
func makeRecovery(ctx context.Context, n *node.Node, kek *seal.Secret, opts InitOptions) (seal.Slot, error) {
	recipients := opts.Recipients
	var identity *seal.Secret
	if len(recipients) == 0 {
		var recipient string
		var err error
		if identity, recipient, err = recovery.GenerateIdentity(n.Memory); err != nil {
			return seal.Slot{}, err
		}
		defer identity.Close()
		recipients = []string{recipient}
	}
	w, err := recovery.NewWrapper(n.Memory, recipients)
	if err != nil {
		return seal.Slot{}, fmt.Errorf("--recovery-recipient: %w", err)
	}
	slot, err := w.Wrap(ctx, kek)
	if err == nil && identity != nil {
		err = handOver(ctx, n, opts.Prompter, identity, slot, kek)
	}
	return slot, err
}

// ReadBackTries is the number of times that the operator may mistype the identity.
const ReadBackTries = 3

// handOver shows the identity once, and opens the slot with the identity that the
// operator types: an identity that nobody kept opens nothing.
func handOver(ctx context.Context, n *node.Node, p Prompter, identity *seal.Secret, slot seal.Slot, kek *seal.Secret) error {
	if p == nil {
		return errors.New("nobody is there to keep the recovery identity; give --recovery-recipient")
	}
	if err := p.ShowIdentity(identity); err != nil {
		return err
	}
	for range ReadBackTries {
		given, err := p.AskIdentity()
		if err != nil {
			return notGivenBack(err)
		}
		if err = identityOpens(ctx, n, given, slot, kek); err == nil {
			return nil
		}
		p.Tell(fmt.Sprintf("that does not open the recovery slot: %v", err))
	}
	return notGivenBack(fmt.Errorf("%d lines did not open the recovery slot", ReadBackTries))
}

func notGivenBack(err error) error {
	if errors.Is(err, io.EOF) {
		err = errors.New("the input ended")
	}
	return fmt.Errorf("the recovery identity was not given back: %w; nothing was made, run kleidi init again, or name --recovery-recipient age1…", err)
}

func identityOpens(ctx context.Context, n *node.Node, identity []byte, slot seal.Slot, kek *seal.Secret) error {
	secret, err := n.Memory.Take(identity)
	if err != nil {
		return err
	}
	defer secret.Close()
	w, err := recovery.NewOpener(n.Memory, secret)
	if err != nil {
		return err
	}
	return rotation.Prove(ctx, kek, []seal.Slot{slot}, []seal.Wrapper{w})
}
