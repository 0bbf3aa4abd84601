package tpm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/device"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

// Config is the configuration of a Wrapper.
type Config struct {
	Device  *device.Device
	Owner   keys.Owner
	Counter Counter
	Memory  seal.Memory
	// Node is the name of this machine in the keyring.
	Node string
	// State returns the attested boot state that Wrap seals to.
	State func(context.Context) (BootState, error)
	// Signed returns all known boot states that this signer has signed. Nothing vouches
	// for them. nil means none.
	Signed func(Signer) []authpolicy.SignedState
	// Ask makes a slot's verifier sign for a session with this nonce. nil means that no
	// verifier can be asked.
	Ask func(context.Context, transport.TPM, *keys.SRK, Verifier, []byte) (tpm2.TPMTSignature, error)
}

// Wrapper seals KEKs to this machine's TPM. It implements [seal.Wrapper].
type Wrapper struct {
	Config
	ahead   uint64                  // how many epochs above the counter Wrap seals to
	revoke  []seal.Slot             // slots whose epochs end before the epoch of a new slot
	follows bool                    // refuse to re-create a revoked slot
	asks    *Verifier               // the verifier that must agree to opening a new slot, if not nil
	like    *slotData               // the slot whose storage root key Wrap seals to, if not nil
	ek      *atomic.Pointer[string] // the machine's EK digest once known: making the key takes seconds
}

// NewWrapper returns the TPM wrapper; it touches no TPM.
func NewWrapper(c Config) *Wrapper { return &Wrapper{Config: c, ek: new(atomic.Pointer[string])} }

// SealOptions change how a [Wrapper] seals. Without them it seals to the present epoch,
// on whichever TPM answers.
type SealOptions struct {
	// NextEpoch seals for the epoch after the present one, and after the epochs of the
	// slots in Revoke. Those slots no longer open once Settle has ended their epochs.
	NextEpoch bool
	Revoke    []seal.Slot
	// Verifier must agree before a slot opens; nil means no verifier.
	Verifier *Verifier
	// SameTPMAs are authenticated slots. A new slot is sealed under the storage root
	// key of this node's TPM slot among them and under no other, so that an impostor in
	// the TPM's place learns nothing. If there is no such slot, the TPM that answers is
	// trusted.
	SameTPMAs []seal.Slot
}

// With returns a wrapper that seals with the options o. It fails if a slot in o can't
// be read.
func (w *Wrapper) With(o SealOptions) (*Wrapper, error) {
	next := *w
	next.asks, next.revoke = o.Verifier, o.Revoke
	if o.NextEpoch {
		next.ahead = 1
	}
	for _, s := range o.SameTPMAs {
		if s.Type != seal.TypeTPM || s.Node != w.Node {
			continue
		}
		d, err := parseSlot(s, w.Counter)
		if err != nil {
			return nil, err
		}
		next.like = d
	}
	return &next, nil
}

// Type implements [seal.Wrapper].
func (w *Wrapper) Type() string { return seal.TypeTPM }

// Provision creates the epoch counter in the TPM if it is missing, and returns the
// machine's EK digest. Only what seals to a TPM for the first time calls it (init, recover,
// join and reseal --new-tpm): anywhere else a missing counter is a fault.
func (w *Wrapper) Provision(ctx context.Context) (ek string, err error) {
	err = w.Device.Do(ctx, func(t transport.TPM) error {
		if ek, err = w.digest(t); err != nil {
			return err
		}
		return keys.WithSRK(t, w.Owner, nil, func(srk *keys.SRK) error {
			_, err := w.Counter.Ensure(t, srk)
			return err
		})
	})
	return ek, classify(err)
}

// Wrap implements [seal.Wrapper]: it seals kek under the attested boot state and
// the present epoch.
func (w *Wrapper) Wrap(ctx context.Context, kek *seal.Secret) (seal.Slot, error) {
	state, err := w.State(ctx)
	if err != nil {
		return seal.Slot{}, err
	}
	return w.WrapState(ctx, kek, state)
}

// WrapState seals kek under a boot state that need not be the present one.
func (w *Wrapper) WrapState(ctx context.Context, kek *seal.Secret, state BootState) (seal.Slot, error) {
	state.Verifier = w.asks
	return w.wrap(ctx, kek, state, w.like)
}

// WrapLike seals kek under the boot state of an authenticated slot of this node and the
// present epoch. Rotation uses it. The machine starts in the boot state of the slot,
// but the present boot state may be a later one, since PCR 11 moves with the phases of
// the boot.
func (w *Wrapper) WrapLike(ctx context.Context, kek *seal.Secret, like seal.Slot) (seal.Slot, error) {
	if like.Type != seal.TypeTPM || like.Node != w.Node {
		return seal.Slot{}, seal.ErrNotMine
	}
	d, err := parseSlot(like, w.Counter)
	if err != nil {
		return seal.Slot{}, err
	}
	follower := *w
	follower.follows = true
	return follower.wrap(ctx, kek, *d.state, d)
}

// Epoch returns the present epoch. A slot whose last epoch is lower is revoked.
func (w *Wrapper) Epoch(ctx context.Context) (epoch uint64, err error) {
	err = w.Device.Do(ctx, func(t transport.TPM) error {
		return w.withSRK(t, w.like, func(srk *keys.SRK) error {
			epoch, err = w.Counter.Read(t, srk)
			return err
		})
	})
	return epoch, classify(err)
}

// wrap seals to the storage root key of the authenticated slot like, if like is not
// nil. An impostor in the TPM's place then learns nothing.
func (w *Wrapper) wrap(ctx context.Context, kek *seal.Secret, state BootState, like *slotData) (seal.Slot, error) {
	var size int
	kek.With(func(b []byte) { size = len(b) })
	if size != seal.KEKSize {
		return seal.Slot{}, errors.New("wrap for the TPM: no KEK to wrap: it is closed or has the wrong size")
	}
	if err := state.Check(); err != nil {
		return seal.Slot{}, seal.Errorf(seal.CauseBootState, "choose other PCRs with tpm.pcrs", "this boot state can't be sealed to: %w", err)
	}
	d := newSlotData(&state)
	if like != nil {
		d.Epoch = like.Epoch // keep the end of an epoch that is still to come
	}
	defer seal.Collect() // the command, as go-tpm marshalled it
	err := w.Device.Do(ctx, func(t transport.TPM) (err error) {
		if d.EK, err = w.digest(t); err != nil {
			return err
		}
		return w.withSRK(t, like, func(srk *keys.SRK) error { return w.seal(t, srk, kek, d) })
	})
	if err != nil {
		return seal.Slot{}, classify(err)
	}
	data, err := json.Marshal(d)
	if err != nil {
		return seal.Slot{}, err
	}
	return seal.Slot{Type: seal.TypeTPM, Node: w.Node, Data: data}, nil
}

func (w *Wrapper) digest(t transport.TPM) (string, error) {
	if known := w.ek.Load(); known != nil {
		return *known, nil
	}
	ek, err := keys.EKDigest(t)
	if err == nil {
		w.ek.Store(&ek)
	}
	return ek, err
}

// seal creates the sealed object; the KEK crosses the bus encrypted.
func (w *Wrapper) seal(t transport.TPM, srk *keys.SRK, kek *seal.Secret, d *slotData) error {
	epoch, err := w.Counter.Read(t, srk)
	if err != nil {
		return err
	}
	d.SRK = srk.Name.Buffer
	if w.follows && d.Epoch.AtMost < epoch {
		return fmt.Errorf("a revoked slot is not sealed again: %w", authpolicy.ErrEpoch)
	}
	beyond := w.beyond(srk)
	if beyond > epoch+MaxRaise {
		if w.like != nil {
			return seal.Errorf(seal.CauseEpoch, "bring the virtual TPM's state back; else run kleidi recover, which can't revoke those copies",
				"the epoch counter went back: it is at %d, and slots up to epoch %d are to be revoked", epoch, beyond-1)
		}
		beyond = 0
	}
	d.Epoch = slotEpoch{Index: w.Counter.Index(), AtMost: max(epoch+w.ahead, d.Epoch.AtMost, beyond)}
	digest, err := terms(d.state, w.Counter, d.Epoch.AtMost).Digest()
	if err != nil {
		return err
	}
	var r *tpm2.CreateResponse
	kek.With(func(b []byte) {
		r, err = tpm2.Create{
			ParentHandle: srk.Auth(srk.Session(tpm2.AESEncryption(128, tpm2.EncryptIn))),
			InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
				Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: b})}},
			InPublic: tpm2.New2B(tpm2.TPMTPublic{
				Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256,
				ObjectAttributes: keys.SealedAttributes, AuthPolicy: tpm2.TPM2BDigest{Buffer: digest},
			}),
		}.Execute(t)
	})
	if err != nil {
		return fmt.Errorf("TPM2_Create: %w", err)
	}
	public, err := r.OutPublic.Contents()
	if err != nil {
		return fmt.Errorf("TPM2_Create: %w", err)
	}
	if err := checkPublic(public, keys.SealedAttributes, digest); err != nil {
		return fmt.Errorf("TPM2_Create: %w", err)
	}
	d.Public, d.Private = tpm2.Marshal(public), r.OutPrivate.Buffer
	return nil
}

// MaxRaise bounds the raise of an epoch counter in one step: by one, plus one for each
// earlier end of an epoch that failed. NV memory wears out.
const MaxRaise = 16

// beyond returns the first epoch in which none of the slots to be revoked opens. It is
// above the next epoch if an earlier revocation was not finished. Slots of another TPM
// do not count, because they belong to another counter.
func (w *Wrapper) beyond(srk *keys.SRK) (epoch uint64) {
	for _, s := range w.revoke {
		d, err := parseSlot(s, w.Counter)
		if err == nil && s.Type == seal.TypeTPM && s.Node == w.Node && bytes.Equal(d.SRK, srk.Name.Buffer) {
			epoch = max(epoch, d.Epoch.AtMost+1)
		}
	}
	return epoch
}

// withSRK runs f with the storage root key that a slot names, or with the TPM's own if
// d is nil.
func (w *Wrapper) withSRK(t transport.TPM, d *slotData, f func(*keys.SRK) error) error {
	if d == nil {
		return keys.WithSRK(t, w.Owner, nil, f)
	}
	err := keys.WithSRK(t, w.Owner, d.SRK, f)
	if errors.Is(err, keys.ErrOtherSRK) {
		return otherTPM(t, d.EK)
	}
	return err
}

// otherTPM distinguishes a cleared TPM from another TPM.
func otherTPM(t transport.TPM, ek string) error {
	now, err := keys.EKDigest(t)
	if err != nil {
		return err
	}
	if now == ek {
		return seal.Errorf(seal.CauseTPMCleared, "while the keyring is open, run kleidi reseal --new-tpm",
			"this TPM was cleared after the slot was sealed: its storage root key is gone").OrRecover()
	}
	return seal.Errorf(seal.CauseOtherTPM, "put the disk back into its machine; while another wrapper holds the keyring open, run kleidi reseal --new-tpm",
		"the slot was sealed by another TPM: its endorsement key is %.19s…, this one's is %.19s…", ek, now).OrRecover()
}

// Settle ends the epochs before the one that the slots of this node were sealed for.
// The caller calls it once the keyring with these slots is saved and anchored, and
// again at every start, because a crash may have come in between. On another TPM, or
// after TPM2_Clear, there is nothing to end: none of the slots opens there.
func (w *Wrapper) Settle(ctx context.Context, slots []seal.Slot) error {
	var target *slotData // the slot with the lowest last epoch: every slot must still open
	for _, s := range slots {
		if s.Type != seal.TypeTPM || s.Node != w.Node {
			continue
		}
		d, err := parseSlot(s, w.Counter)
		if err != nil {
			return err
		}
		if target == nil || d.Epoch.AtMost < target.Epoch.AtMost {
			target = d
		}
	}
	if target == nil {
		return nil
	}
	err := classify(w.Device.Do(ctx, func(t transport.TPM) error {
		return w.withSRK(t, target, func(srk *keys.SRK) error { return w.Counter.RaiseTo(t, srk, target.Epoch.AtMost) })
	}))
	if cause := seal.CauseOf(err); cause == seal.CauseOtherTPM || cause == seal.CauseTPMCleared {
		return nil
	}
	return err
}

// Revoke ends the epochs of authenticated slots that no slot of this node follows. Call it
// before the keyring is saved without them. After a crash in between, the slots are still
// in the keyring, refused, and can be removed again.
func (w *Wrapper) Revoke(ctx context.Context, slots []seal.Slot) error {
	own, err := w.With(SealOptions{NextEpoch: true, Revoke: slots, SameTPMAs: slots})
	if err != nil {
		return err
	}
	return classify(own.Device.Do(ctx, func(t transport.TPM) error {
		return own.withSRK(t, own.like, func(srk *keys.SRK) error { return own.Counter.RaiseTo(t, srk, own.beyond(srk)) })
	}))
}
