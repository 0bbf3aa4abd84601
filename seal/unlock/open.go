package unlock

import (
	"cmp"
	"context"
	"errors"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/store"
)

// attempt loads the keyring and opens it with the first slot that opens.
func (u *Unlocker) attempt(ctx context.Context, timing *Timing) (*keyring.Keyring, store.Version, Opener, error) {
	start := time.Now()
	untrusted, anchor, version, err := u.load(ctx)
	timing.Load = time.Since(start)
	if err != nil {
		return nil, "", Opener{}, err
	}
	k, by, err := u.openWith(ctx, untrusted, anchor, timing)
	return k, version, by, err
}

// openWith opens untrusted: first the gate, then a slot, then the checks of the keyring
// itself.
func (u *Unlocker) openWith(ctx context.Context, untrusted *keyring.Untrusted, anchor *keyring.Anchor, timing *Timing) (*keyring.Keyring, Opener, error) {
	start := time.Now()
	gate, err := u.attest(ctx, untrusted.Slots())
	timing.Gate = time.Since(start)
	if err != nil {
		return nil, Opener{}, err
	}
	start = time.Now()
	kek, by, err := u.unwrap(ctx, untrusted.Slots(), gate)
	timing.Slots = time.Since(start)
	if err != nil {
		return nil, by, err
	}
	k, err := untrusted.Open(kek, anchor)
	if err != nil {
		kek.Close()
		return nil, by, withoutRecovery(untrusted.Slots(), err)
	}
	k, by.Staged = u.openStaged(ctx, k, gate)
	timing.Slots = time.Since(start)
	return k, by, nil
}

// attest returns the gate's verdict on this boot. err is a reason not to open any KEK,
// whatever the gate says.
func (u *Unlocker) attest(ctx context.Context, slots []seal.Slot) (gate, err error) {
	if u.cfg.Ready != nil {
		if err := u.cfg.Ready(); err != nil {
			return nil, err
		}
	}
	if u.cfg.Gate != nil {
		gate = u.cfg.Gate.Attest(ctx, slots)
	}
	return gate, nil
}

// openStaged opens the staged KEK of k, if there is one, so that this node can decrypt
// what another node encrypts after activating that KEK. If the KEK does not open, the
// node serves without it: openStaged returns k and the reason.
func (u *Unlocker) openStaged(ctx context.Context, k *keyring.Keyring, gate error) (*keyring.Keyring, error) {
	id := k.StagedID()
	if id == "" {
		return k, nil
	}
	kek, _, err := u.unwrap(ctx, k.StagedSlots(), gate)
	if err == nil {
		var opened *keyring.Keyring
		if opened, err = k.OpenStaged(kek); err == nil {
			k.Close()
			return opened, nil
		}
		kek.Close()
	}
	cause := cmp.Or(seal.CauseOf(err), seal.CauseUnavailable)
	message, _ := seal.SplitHint(err)
	hint := "this node goes on serving; once the cause is removed, send it a SIGHUP, or run kleidi rotate --abort on a node where that KEK is open"
	if len(k.Nodes()) == 1 {
		hint = "this node goes on serving; once the cause is removed, send it a SIGHUP, or run kleidi rotate, which stages a fresh KEK"
	}
	return k, seal.Errorf(cause, hint, "the staged KEK %s does not open: %s", id, message)
}

func (u *Unlocker) load(ctx context.Context) (*keyring.Untrusted, *keyring.Anchor, store.Version, error) {
	raw, version, err := u.cfg.Store.Load(ctx)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil, "", seal.Errorf(seal.CauseKeyringMissing, HintMissing, "there is no keyring: %w", err)
	}
	if err != nil {
		return nil, nil, "", storeError("keyring", err)
	}
	untrusted, err := keyring.Parse(raw)
	if err != nil {
		return nil, nil, "", err
	}
	anchor, err := u.cfg.Anchor.Load(ctx)
	if err != nil {
		return nil, nil, "", withoutRecovery(untrusted.Slots(), err)
	}
	if anchor == nil {
		missing := seal.Errorf(seal.CauseAnchor, "put the anchor file back, or run kleidi recover --trust-key-id KEY_ID with the recovery identity; docs/recovery.md says where to look for the key ID",
			"there is a keyring but no anchor, so nothing proves that it is this node's keyring")
		missing.NoRecovery = "put the anchor file back"
		return nil, nil, "", withoutRecovery(untrusted.Slots(), missing)
	}
	return untrusted, anchor, version, nil
}

// unwrap tries the slots with one wrapper after the other, in the configured order. It
// passes over slots that the wrapper did not make. It tries only configured wrappers:
// another wrapper replaces a failing TPM only if the operator configured it.
func (u *Unlocker) unwrap(ctx context.Context, slots []seal.Slot, gate error) (*seal.Secret, Opener, error) {
	failure := gate
	var missing error // the first wrapper without a slot
	for i, w := range u.cfg.Wrappers {
		var refusal error
		hasSlot := false
		for _, s := range slots {
			if !u.passes(gate, w, s) {
				hasSlot = true // or so we assume: the gate keeps us from trying
				continue
			}
			kek, err := w.Unwrap(ctx, s)
			if err == nil {
				by := u.openedBy(w, gate, cmp.Or(failure, missing))
				if i == 0 { // an ungated first wrapper is no fallback, whatever the gate says
					by.Fallback = nil
				}
				return kek, by, nil
			}
			if errors.Is(err, seal.ErrNotMine) {
				continue
			}
			hasSlot = true
			if refusal == nil || moreSpecific(err, refusal) {
				refusal = err
			}
		}
		if !hasSlot && missing == nil {
			missing = noSlot(w.Type())
		}
		if refusal != nil && u.cfg.Gate != nil {
			refusal = u.cfg.Gate.Explain(refusal)
		}
		if refusal != nil {
			refusal = withoutRecovery(slots, refusal)
		}
		failure = joinFailures(failure, w.Type(), refusal)
	}
	if failure == nil {
		failure = withoutRecovery(slots, seal.Errorf(seal.CauseNoSlot, u.hintNoSlot(slots),
			"the keyring holds no slot for this node and its configured wrappers, only for %s", owners(slots)).OrRecover())
	}
	return nil, Opener{}, failure
}

// withoutRecovery returns err, without the advice to use a recovery identity if none of
// these slots is a recovery slot.
func withoutRecovery(slots []seal.Slot, err error) error {
	if slices.ContainsFunc(slots, func(s seal.Slot) bool { return s.Type == seal.TypeRecovery }) {
		return err
	}
	return seal.WithoutRecovery(err)
}

// noSlot says that a configured wrapper can't open the keyring because it has no slot
// there.
func noSlot(kind string) error {
	hint := "run kleidi slot add " + kind
	if kind == seal.TypeTPM {
		hint = "if this machine was renamed, set node to its former name; else run kleidi reseal --new-tpm"
	}
	return seal.Errorf(seal.CauseNoSlot, hint, "the keyring holds no %s slot for this node", kind)
}

// passes reports whether wrapper w may try slot s after the gate has answered gate.
func (u *Unlocker) passes(gate error, w seal.Wrapper, s seal.Slot) bool {
	if gate == nil || u.ungated(w) {
		return true
	}
	o, ok := errors.AsType[Overruled](gate)
	return ok && w.Type() == s.Type && o.Overrules(s)
}

func (u *Unlocker) ungated(w seal.Wrapper) bool {
	return u.cfg.Ungated != nil && u.cfg.Ungated(w.Type())
}

// openedBy returns the Opener of a keyring that w opened after the failures in earlier.
// It logs if a suspension has overruled the gate.
func (u *Unlocker) openedBy(w seal.Wrapper, gate, earlier error) Opener {
	if _, ok := errors.AsType[Overruled](gate); ok && !u.ungated(w) {
		u.cfg.Log.Warn("the boot policy refuses this boot; the suspension overrules it", "error", gate)
		return Opener{Wrapper: w.Type()}
	}
	return Opener{Wrapper: w.Type(), Fallback: earlier}
}

// hintNoSlot returns the remedy for a keyring without a usable slot: either unlock.order
// leaves out the type of a slot, or the slots are for other nodes. It never advises what
// the slots suggest: no slot opened, so nothing authenticates them. A forged keyring with
// only a slot of the TPM must not talk an operator out of two-of-two.
func (u *Unlocker) hintNoSlot(slots []seal.Slot) string {
	for _, s := range slots {
		backed := slices.Contains([]string{seal.TypeTPM, seal.TypePKCS11, seal.TypeVault, seal.TypeKMSPlugin, seal.TypeTPMAndPKCS11, seal.TypeTPMAndVault, seal.TypeTPMAndKMSPlugin}, s.Type)
		if backed && !slices.ContainsFunc(u.cfg.Wrappers, func(w seal.Wrapper) bool { return w.Type() == s.Type }) {
			return "compare unlock.order with what you set up (nothing authenticates this list of slots); if unlock.order is right, this is not this node's keyring: run kleidi keyring restore FILE with a backup"
		}
	}
	return "if this machine was renamed, set node to its former name"
}

// maxOwners bounds the list of owners, in runes.
const maxOwners = 200

// owners lists the types and nodes of the slots, printable and bounded.
func owners(slots []seal.Slot) string {
	var all []string
	for _, s := range slots {
		name := s.Type
		if s.Node != "" {
			name += " of node " + s.Node
		}
		all = append(all, name)
	}
	return seal.OneLine(strings.Join(all, ", "), maxOwners)
}

// moreSpecific reports whether err explains the refusal better than an error that only
// says that the boot state is wrong. The TPM checks the PCRs first, so an error from a
// later check tells more. A revoked slot means an old keyring; a verifier that refuses,
// or can't be reached, is the thing to repair.
func moreSpecific(err, than error) bool {
	further := []seal.Cause{seal.CauseEpoch, seal.CauseBootPolicy, seal.CauseAttestation, seal.CauseUnavailable, seal.CauseKeyMissing, seal.CauseCredentials}
	return seal.CauseOf(than) == seal.CauseBootState && slices.Contains(further, seal.CauseOf(err))
}
