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
)

// Counter is the node's epoch counter, see package nv.
type Counter interface {
	Index() uint32
	Name() []byte
	Read(transport.TPM, *SRK) (uint64, error)
	Ensure(transport.TPM, *SRK) (uint64, error)
	RaiseTo(t transport.TPM, srk *SRK, value uint64) error
}

// Config is what a Wrapper needs.
type Config struct {
	Device  *Device
	Owner   Owner
	Counter Counter
	Memory  seal.Memory
	// Node is the name of this machine in the keyring.
	Node string
	// State returns the attested boot state that Wrap seals to.
	State func(context.Context) (BootState, error)
	// Signed returns the boot states that are signed by this signer, wherever they
	// are kept; nothing vouches for them. nil is none.
	Signed func(Signer) []authpolicy.SignedState
	// Ask has a slot's verifier sign for a session with this nonce. nil means that
	// none can be asked.
	Ask func(context.Context, transport.TPM, *SRK, Verifier, []byte) (tpm2.TPMTSignature, error)
}

// Wrapper seals KEKs to this machine's TPM. It implements [seal.Wrapper].
type Wrapper struct {
	Config
	ahead   uint64                  // by how many epochs Wrap seals ahead of the counter
	revoke  []seal.Slot             // whose epochs end before that of what Wrap makes
	follows bool                    // a slot that is like one that is revoked is not made
	asks    *Verifier               // who must agree to what Wrap makes, if not nil
	like    *slotData               // whose storage root key Wrap seals to, if not nil
	ek      *atomic.Pointer[string] // the machine's EK digest once known: making the key takes seconds
}

// NewWrapper returns the TPM wrapper; it touches no TPM.
func NewWrapper(c Config) *Wrapper { return &Wrapper{Config: c, ek: new(atomic.Pointer[string])} }

// SealOptions say how a [Wrapper] seals where that is not to the present epoch of
// whichever TPM answers.
type SealOptions struct {
	// NextEpoch seals for the epoch after the present one, and after those of the slots
	// in Revoke: these no longer open once Settle has ended it.
	NextEpoch bool
	Revoke    []seal.Slot
	// Verifier must agree before a slot opens; nil is none.
	Verifier *Verifier
	// SameTPMAs are authenticated slots. Sealing goes under the storage root key of this
	// node's TPM slot among them and under no other, so that an impostor in the TPM's
	// place learns nothing. Without one, the TPM that answers is trusted.
	SameTPMAs []seal.Slot
}

// With returns a wrapper that seals as o says. An error is that of a slot that can't
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

// Provision makes what sealing needs in the TPM, the epoch counter, where it is
// missing, and returns the machine's EK digest. Only init and recover call it:
// anywhere else a missing counter is a fault.
func (w *Wrapper) Provision(ctx context.Context) (ek string, err error) {
	err = w.Device.Do(ctx, func(t transport.TPM) error {
		if ek, err = w.digest(t); err != nil {
			return err
		}
		return WithSRK(t, w.Owner, nil, func(srk *SRK) error {
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

// WrapLike seals kek under the boot state of an authenticated slot of this node
// and the present epoch. Rotation uses it: the boot state in which the machine
// starts is the slot's; the present one may have gone further, since PCR 11
// moves with the phases of the boot.
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

// Epoch returns the present epoch. A slot whose last one is below it is revoked.
func (w *Wrapper) Epoch(ctx context.Context) (epoch uint64, err error) {
	err = w.Device.Do(ctx, func(t transport.TPM) error {
		return w.withSRK(t, w.like, func(srk *SRK) error {
			epoch, err = w.Counter.Read(t, srk)
			return err
		})
	})
	return epoch, classify(err)
}

// wrap seals to the storage root key of the authenticated slot like, if there is
// one: who answers in the TPM's place learns nothing then.
func (w *Wrapper) wrap(ctx context.Context, kek *seal.Secret, state BootState, like *slotData) (seal.Slot, error) {
	var size int
	kek.With(func(b []byte) { size = len(b) })
	if size != seal.KEKSize {
		return seal.Slot{}, errors.New("wrap for the TPM: no KEK to wrap: it is closed or of another size")
	}
	if err := state.Check(); err != nil {
		return seal.Slot{}, seal.Errorf(seal.CauseBootState, "choose other PCRs with tpm.pcrs", "this boot state can't be sealed to: %w", err)
	}
	d := newSlotData(&state)
	if like != nil {
		d.Epoch = like.Epoch // an end of an epoch that is still to come stays so
	}
	defer seal.Collect() // the command, as go-tpm marshalled it
	err := w.Device.Do(ctx, func(t transport.TPM) (err error) {
		if d.EK, err = w.digest(t); err != nil {
			return err
		}
		return w.withSRK(t, like, func(srk *SRK) error { return w.seal(t, srk, kek, d) })
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
	ek, err := EKDigest(t)
	if err == nil {
		w.ek.Store(&ek)
	}
	return ek, err
}

// seal creates the sealed object; the KEK crosses the bus encrypted.
func (w *Wrapper) seal(t transport.TPM, srk *SRK, kek *seal.Secret, d *slotData) error {
	epoch, err := w.Counter.Read(t, srk)
	if err != nil {
		return err
	}
	d.SRK = srk.Name.Buffer
	if w.follows && d.Epoch.AtMost < epoch {
		return fmt.Errorf("what is revoked is not made anew: %w", authpolicy.ErrEpoch)
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
			ParentHandle: srk.auth(srk.Session(tpm2.AESEncryption(128, tpm2.EncryptIn))),
			InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
				Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: b})}},
			InPublic: tpm2.New2B(tpm2.TPMTPublic{
				Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256,
				ObjectAttributes: sealedAttributes, AuthPolicy: tpm2.TPM2BDigest{Buffer: digest},
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
	if err := checkPublic(public, sealedAttributes, digest); err != nil {
		return fmt.Errorf("TPM2_Create: %w", err)
	}
	d.Public, d.Private = tpm2.Marshal(public), r.OutPrivate.Buffer
	return nil
}

// MaxRaise bounds by how much an epoch counter is raised at once: by one, and one
// more for each earlier end of an epoch that failed. NV memory wears out.
const MaxRaise = 16

// beyond is the first epoch after those in which the slots to be revoked open. It
// is above the next one where an earlier revocation was not carried to its end.
// Slots of another TPM do not count: its counter was another.
func (w *Wrapper) beyond(srk *SRK) (epoch uint64) {
	for _, s := range w.revoke {
		d, err := parseSlot(s, w.Counter)
		if err == nil && s.Type == seal.TypeTPM && s.Node == w.Node && bytes.Equal(d.SRK, srk.Name.Buffer) {
			epoch = max(epoch, d.Epoch.AtMost+1)
		}
	}
	return epoch
}

// withSRK runs f with the storage root key that a slot names; nil takes the TPM's.
func (w *Wrapper) withSRK(t transport.TPM, d *slotData, f func(*SRK) error) error {
	if d == nil {
		return WithSRK(t, w.Owner, nil, f)
	}
	err := WithSRK(t, w.Owner, d.SRK, f)
	if errors.Is(err, errOtherSRK) {
		return otherTPM(t, d.EK)
	}
	return err
}

// otherTPM tells a TPM that was cleared from another one.
func otherTPM(t transport.TPM, ek string) error {
	now, err := EKDigest(t)
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

// Settle ends the epochs before the one that the slots of this node were sealed
// for. It is called once the keyring that holds them is saved and anchored, and
// again at every start, since a crash may have come in between. On another TPM, and
// on one that was cleared, there is nothing to end: none of them opens there.
func (w *Wrapper) Settle(ctx context.Context, slots []seal.Slot) error {
	var target *slotData // a slot that must still open keeps its epoch
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
		return w.withSRK(t, target, func(srk *SRK) error { return w.Counter.RaiseTo(t, srk, target.Epoch.AtMost) })
	}))
	if cause := seal.CauseOf(err); cause == seal.CauseOtherTPM || cause == seal.CauseTPMCleared {
		return nil
	}
	return err
}

// Revoke ends the epochs of authenticated slots that none of this node follows. It is
// called before the keyring without them is saved: after a crash in between they
// are there and refused, and can be taken away again.
func (w *Wrapper) Revoke(ctx context.Context, slots []seal.Slot) error {
	own, err := w.With(SealOptions{NextEpoch: true, Revoke: slots, SameTPMAs: slots})
	if err != nil {
		return err
	}
	return classify(own.Device.Do(ctx, func(t transport.TPM) error {
		return own.withSRK(t, own.like, func(srk *SRK) error { return own.Counter.RaiseTo(t, srk, own.beyond(srk)) })
	}))
}

// classify gives an error of the TPM its cause.
func classify(err error) error {
	var state *StateError
	switch {
	case err == nil, seal.CauseOf(err) != "":
		return err
	case errors.Is(err, authpolicy.ErrNoSignedState), errors.Is(err, authpolicy.ErrSignature), errors.Is(err, authpolicy.ErrKey):
		return seal.Errorf(seal.CauseBootState, "boot one that is signed, sign it with kleidi bootstate sign --key FILE --cluster-id ID --event-log FILE and add it with kleidi bootstate add FILE --public-key FILE",
			"the way in which the machine booted is not among the signed boot states: %w", err).OrRecover()
	case errors.Is(err, authpolicy.ErrResets):
		return seal.Errorf(seal.CauseBootState, "boot what was booted before it", "the suspension is over, or the machine was restarted without a reset of its TPM: %w", err).OrRecover()
	case errors.As(err, &state):
		return seal.Errorf(seal.CauseBootState, "boot the earlier kernel and settings", "the machine did not boot as it did when the slot was sealed: %w", err).OrRecover()
	case errors.Is(err, authpolicy.ErrEpoch):
		return seal.Errorf(seal.CauseEpoch, "use the present keyring, not an older copy", "the slot was revoked by a later reseal: %w", err).OrRecover()
	case errors.Is(err, authpolicy.ErrCounter):
		return seal.Errorf(seal.CauseEpoch, "find out who removed or replaced kleidi's epoch counter", "%w", err).OrRecover()
	case errors.Is(err, tpm2.TPMRCLockout):
		return &seal.Error{Cause: seal.CauseLockout, Err: fmt.Errorf("the TPM is in dictionary-attack lockout: %w", err),
			Hint: "wait for it to end, or clear it with tpm2_dictionarylockout --clear-lockout"}
	case isTPMError(err):
		return &seal.Error{Cause: seal.CauseUnavailable, Err: fmt.Errorf("the TPM refused: %w", err), Hint: "kleidi serve tries again; see the TPM's state with tpm2_getcap properties-variable"}
	default:
		return &seal.Error{Cause: seal.CauseUnavailable, Err: fmt.Errorf("the TPM's answer makes no sense: %w", err), Hint: "kleidi serve tries again; if it stays so, the TPM or what stands before it is faulty"}
	}
}
