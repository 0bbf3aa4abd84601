package unlock

import (
	"cmp"
	"context"
	"errors"
	"fmt"
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

// openWith is the gate, then the slots, then the keyring's own checks.
func (u *Unlocker) openWith(ctx context.Context, untrusted *keyring.Untrusted, anchor *keyring.Anchor, timing *Timing) (*keyring.Keyring, Opener, error) {
	start := time.Now()
	if u.cfg.Ready != nil {
		if err := u.cfg.Ready(); err != nil {
			return nil, Opener{}, err
		}
	}
	var gate error
	if u.cfg.Gate != nil {
		gate = u.cfg.Gate.Attest(ctx, untrusted.Slots())
	}
	timing.Gate = time.Since(start)
	start = time.Now()
	kek, by, err := u.unwrap(ctx, untrusted.Slots(), gate)
	timing.Slots = time.Since(start)
	if err != nil {
		return nil, by, err
	}
	k, err := untrusted.Open(kek, anchor)
	if err != nil {
		kek.Close()
		return nil, by, err
	}
	k, by.Staged = u.openStaged(ctx, k, gate)
	timing.Slots = time.Since(start)
	return k, by, nil
}

// openStaged opens the KEK that k stages, if any, so that this node decrypts what
// another node encrypts once it has activated that KEK. The node serves without it:
// openStaged then returns k as it was, and why.
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
	return k, seal.Errorf(cause, "this node goes on serving; send it a SIGHUP once that is mended, or kleidi rotate, which stages a fresh KEK", "the staged KEK %s does not open: %s", id, message)
}

// Opener is which wrapper opened a slot, and why those before it did not.
type Opener struct {
	// Wrapper is its type.
	Wrapper string
	// Fallback is nil where it is the first one.
	Fallback error
	// Staged is why the staged KEK is not open; nil where it is, or none is staged.
	Staged error
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
		return nil, nil, "", err
	}
	if anchor == nil {
		return nil, nil, "", seal.Errorf(seal.CauseAnchor, "put the anchor file back, or run kleidi recover with the recovery identity",
			"there is a keyring but no anchor, so nothing says that it is this node's keyring")
	}
	return untrusted, anchor, version, nil
}

// unwrap tries the slots, wrapper by wrapper in the configured order. A slot that
// is not a wrapper's own is passed over. Only configured wrappers are tried, so
// that a failing TPM gives way to another wrapper only where the operator said so.
func (u *Unlocker) unwrap(ctx context.Context, slots []seal.Slot, gate error) (*seal.Secret, Opener, error) {
	failure := gate
	var missing error // the first wrapper without a slot
	for i, w := range u.cfg.Wrappers {
		var refusal error
		own := false
		for _, s := range slots {
			if !u.passes(gate, w, s) {
				own = true // or so it may be
				continue
			}
			kek, err := w.Unwrap(ctx, s)
			if err == nil {
				by := u.openedBy(w, gate, cmp.Or(failure, missing))
				if i == 0 { // whatever a gate said that it does not need
					by.Fallback = nil
				}
				return kek, by, nil
			}
			if errors.Is(err, seal.ErrNotMine) {
				continue
			}
			own = true
			if refusal == nil || moreSpecific(err, refusal) {
				refusal = err
			}
		}
		if !own && missing == nil {
			missing = noSlot(w.Type())
		}
		if refusal != nil && u.cfg.Gate != nil {
			refusal = u.cfg.Gate.Explain(refusal)
		}
		failure = joinFailures(failure, w.Type(), refusal)
	}
	if failure == nil {
		failure = seal.Errorf(seal.CauseNoSlot, u.hintNoSlot(slots),
			"the keyring holds no slot for this node and its configured wrappers, but for %s", owners(slots))
	}
	return nil, Opener{}, failure
}

// noSlot is why a wrapper that may open the keyring can't, where another one does.
func noSlot(kind string) error {
	hint := "run kleidi slot add " + kind
	if kind == seal.TypeTPM {
		hint = "if this machine was renamed, set node to its former name; else run kleidi reseal --new-tpm"
	}
	return seal.Errorf(seal.CauseNoSlot, hint, "the keyring holds no %s slot for this node", kind)
}

// passes reports whether a wrapper may be tried on a slot after what the gate said.
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

// openedBy tells a fallback from the first wrapper, and says so where a suspension
// has overruled the gate.
func (u *Unlocker) openedBy(w seal.Wrapper, gate, earlier error) Opener {
	if _, ok := errors.AsType[Overruled](gate); ok && !u.ungated(w) {
		u.cfg.Log.Warn("the boot policy refuses this boot; the suspension overrules it", "error", gate)
		return Opener{Wrapper: w.Type()}
	}
	return Opener{Wrapper: w.Type(), Fallback: earlier}
}

// joinFailures keeps the first failure's cause and appends the fallback's message:
// the operator may find the fallback easier to mend.
func joinFailures(failure error, kind string, next error) error {
	if failure == nil || next == nil {
		return cmp.Or(failure, next)
	}
	text, hint := seal.SplitHint(failure)
	return &seal.Error{Cause: seal.CauseOf(failure), Hint: hint, Err: &failures{failure, fmt.Sprintf("%s; %s does not open either: %s", text, kind, next)}}
}

// failures is one failure in whose text others stand too.
type failures struct {
	first error
	text  string
}

func (f *failures) Error() string { return f.text }
func (f *failures) Unwrap() error { return f.first }

// hintNoSlot tells slots that unlock.order does not name from those of another node.
func (u *Unlocker) hintNoSlot(slots []seal.Slot) string {
	const recover = "run kleidi recover with the recovery identity"
	for _, s := range slots {
		backed := slices.Contains([]string{seal.TypeTPM, seal.TypePKCS11, seal.TypeVault, seal.TypeTPMAndPKCS11, seal.TypeTPMAndVault}, s.Type)
		if backed && !slices.ContainsFunc(u.cfg.Wrappers, func(w seal.Wrapper) bool { return w.Type() == s.Type }) {
			return "set unlock.order so that it names " + s.Type + ", and restart kleidi serve; else " + recover
		}
	}
	return "if this machine was renamed, set node to its former name; else " + recover
}

// owners lists whose slots there are.
func owners(slots []seal.Slot) string {
	var all []string
	for _, s := range slots {
		name := s.Type
		if s.Node != "" {
			name += " of node " + s.Node
		}
		all = append(all, name)
	}
	return strings.Join(all, ", ")
}

// moreSpecific reports whether err explains the refusal better than an error that only
// says that the boot state is wrong: the TPM checks the PCRs first, so a slot that got
// further tells more. A revoked slot means an old keyring; a verifier that refuses, or
// can't be reached, is what the operator has to mend.
func moreSpecific(err, than error) bool {
	further := []seal.Cause{seal.CauseEpoch, seal.CauseBootPolicy, seal.CauseAttestation, seal.CauseUnavailable, seal.CauseKeyMissing, seal.CauseCredentials}
	return seal.CauseOf(than) == seal.CauseBootState && slices.Contains(further, seal.CauseOf(err))
}
