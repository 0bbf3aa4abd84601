package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/both"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/recovery"
	"github.com/beezy-dev/kleidi/seal/rotation"
	"github.com/beezy-dev/kleidi/tpm"
)

// The slots of all wrappers: how they are named, added, tested and taken away.

// slotNames names slots by their type, with a number where there are several.
func slotNames(slots []seal.Slot) []string {
	count, seen := map[string]int{}, map[string]int{}
	for _, s := range slots {
		count[typeName(s)]++
	}
	names := make([]string, len(slots))
	for i, s := range slots {
		t := typeName(s)
		seen[t]++
		names[i] = t
		if count[t] > 1 {
			names[i] = fmt.Sprintf("%s/%d", t, seen[t])
		}
	}
	return names
}

// find returns the place of a named slot.
func find(slots []seal.Slot, name string) (int, error) {
	names := slotNames(slots)
	if i := slices.Index(names, name); i >= 0 {
		return i, nil
	}
	return 0, fmt.Errorf("there is no slot %q, but %s; see kleidi slot list", name, joinWords(names))
}

// wrapAll is how rotation makes the slots of a new KEK: like those of the present
// one, but for some that are skipped, which is recorded in their place. breaks is as in
// sealsAlone.
func (n *node) wrapAll(ctx context.Context, k *keyring.Keyring, without []string, breaks bool) (rotation.Wrap, error) {
	slots := k.Slots()
	names := slotNames(slots)
	for _, name := range without {
		i := slices.Index(names, name)
		if i < 0 {
			return nil, fmt.Errorf("--skip-slot: there is no slot %q, but %s; see kleidi slot list", name, joinWords(names))
		}
		var err error
		if slots[i], err = skip(slots[i]); err != nil {
			return nil, err
		}
	}
	if len(without) > 0 && !n.anyOpens(slots) {
		return nil, errors.New("--skip-slot: no slot would be left that can open the keyring on this node; skip fewer, or add another one first")
	}
	live, err := n.unrevoked(ctx, slots)
	if err != nil {
		return nil, err
	}
	like := rotation.Like(n.proven(k), live)
	if len(live) == len(slots) || len(n.demands(live)) > 0 || !n.opensWithTPM() {
		return like, nil
	}
	// All slots of this TPM are revoked, as in an old keyring: the running boot takes
	// their place.
	if !breaks {
		if err := n.sealsAlone(k.Slots()); err != nil {
			return nil, err
		}
	}
	if err := n.sameKey(ctx, k); err != nil {
		return nil, err
	}
	v, err := n.remote.demand(k.ClusterID(), false)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, kek *seal.Secret) ([]seal.Slot, error) {
		slot, err := n.sealNow(ctx, n.tpm.Demanding(v), kek)
		if err != nil {
			return nil, err
		}
		others, err := like(ctx, kek)
		return append([]seal.Slot{slot}, others...), err
	}, nil
}

// unrevoked leaves out the slots of this TPM whose epoch has passed: they must not
// come back.
func (n *node) unrevoked(ctx context.Context, slots []seal.Slot) ([]seal.Slot, error) {
	if len(n.demands(slots)) == 0 {
		return slots, nil
	}
	w, err := n.tpm.OnTPMOf(halves(slots))
	if err != nil {
		return nil, err
	}
	epoch, err := w.Epoch(ctx)
	return slices.DeleteFunc(slices.Clone(slots), func(s seal.Slot) bool { return n.revoked(s, epoch) }), err
}

// anyOpens reports whether one of the slots is of a wrapper that may open the
// keyring on this node; one of the TPM has to be for the running boot, or for signed
// ones.
func (n *node) anyOpens(slots []seal.Slot) bool {
	at, _ := n.running(slots)
	return at >= 0 && n.opensWithTPM() || len(n.states(slots, tpm.UseSigned)) > 0 || slices.ContainsFunc(slots, func(s seal.Slot) bool {
		return slices.Contains(n.cfg.Unlock.Order, s.Type) && !n.isTPM(s)
	})
}

// addSlot wraps the KEK by one wrapper more. A slot of a token or a server takes the
// place of the one that is there, one for recovery that of one that was left out.
func (n *node) addSlot(ctx context.Context, req admin.AddSlotRequest) (admin.KeyringState, error) {
	var bound string
	var made bool
	err := n.unlocker.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		if !req.BreakTwoOfTwo {
			if err := n.breaks(req.Type, k.Slots()); err != nil {
				return nil, err
			}
		}
		w, err := n.adder(req)
		if err != nil {
			return nil, err
		}
		if req.GenerateKey {
			if _, err := n.hsm.GenerateKey(ctx); err != nil {
				return nil, err
			}
			made = true
		} else if err := n.notAnother(ctx, k, w); err != nil {
			return nil, err
		}
		slot, err := w.Wrap(ctx, k.KEK())
		if err != nil {
			return nil, err
		}
		if err := rotation.Prove(ctx, k.KEK(), []seal.Slot{slot}, []seal.Wrapper{w}); err != nil && req.Type != seal.TypeRecovery {
			return nil, err
		}
		bound = n.binding(slot)
		next, err := k.WithSlots(append(others(k.Slots(), req.Type), slot))
		return []*keyring.Keyring{next}, err
	})
	if err != nil && made {
		err = keyMade(err)
	}
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("slot add %s: %w", req.Type, err)
	}
	changes := []string{"the KEK is wrapped by " + req.Type + " as well: " + bound}
	if req.Type != seal.TypeRecovery && !slices.Contains(n.cfg.Unlock.Order, req.Type) {
		changes = append(changes, "it opens nothing at start until unlock.order names "+req.Type)
	}
	return n.unchanged(changes...)
}

// others returns the slots that stay beside a new one of that type.
func others(slots []seal.Slot, kind string) []seal.Slot {
	if kind != seal.TypeRecovery {
		return slices.DeleteFunc(slots, func(s seal.Slot) bool { return typeName(s) == kind })
	}
	// There may be several, each for recipients of its own: one new slot mends one place.
	if i := slices.IndexFunc(slots, func(s seal.Slot) bool { return s.Type == seal.TypeSkipped && typeName(s) == kind }); i >= 0 {
		return slices.Delete(slots, i, i+1)
	}
	return slots
}

func (n *node) adder(req admin.AddSlotRequest) (seal.Wrapper, error) {
	switch {
	case req.Type == seal.TypeRecovery:
		return recovery.NewWrapper(n.mem, req.Recipients)
	case req.Type == seal.TypeTPM, twoOfTwo(req.Type) != "":
		return nil, errors.New("run kleidi reseal, which seals to the running boot")
	case req.Type == seal.TypePKCS11 && n.hsm == nil:
		return nil, errors.New("no token is configured; set pkcs11.module and pkcs11.uri, and restart kleidi serve")
	case req.Type == seal.TypeVault && n.vault == nil:
		return nil, errors.New("no server is configured; set vault.address and vault.key, and restart kleidi serve")
	}
	w := n.wrapper(req.Type)
	if w == nil {
		return nil, errors.New("there is no such wrapper; want pkcs11, vault or recovery")
	}
	if req.GenerateKey && req.Type != seal.TypePKCS11 {
		return nil, errors.New("--generate-key is for pkcs11 alone")
	}
	return w, nil
}

// keyMade is a failure after the token has made a key: the next try has to use that.
func keyMade(err error) error {
	return seal.AddHint(err, "the key is made, so leave --generate-key out when you run it again")
}

// removeSlot takes a slot away. One of this TPM is revoked with its epoch; what is
// kept of others opens the KEK until it is rotated.
func (n *node) removeSlot(ctx context.Context, req admin.RemoveSlotRequest) (admin.KeyringState, error) {
	var changes []string
	err := n.unlocker.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		slots := k.Slots()
		i, err := find(slots, req.Name)
		if err != nil {
			return nil, err
		}
		gone := slots[i]
		rest := slices.Delete(slices.Clone(slots), i, i+1)
		if err := n.someOpens(ctx, k, rest); err != nil {
			return nil, err
		}
		if n.isTPM(gone) && len(n.demands(rest)) > 0 {
			live, err := n.live(ctx, rest, tpm.UsePresent, tpm.UseNext, tpm.UseSuspend, tpm.UseSigned)
			if err != nil {
				return nil, err
			}
			next, _, err := n.reshape(ctx, k, live)
			changes = []string{revokedByTPM}
			return []*keyring.Keyring{next}, err
		}
		changes = n.withoutSlot(ctx, gone, rest)
		next, err := k.WithSlots(rest)
		return []*keyring.Keyring{next}, err
	})
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("slot remove %s: %w", req.Name, err)
	}
	return n.unchanged(append(changes, n.stillNamed(n.openSlots(), req.Name)...)...)
}

const revokedByTPM = "the TPM no longer opens it, kept copies included"

// withoutSlot says what it means that a slot goes. If it is the last one of this TPM,
// which no slot of the next epoch follows, the TPM is told to refuse it first.
func (n *node) withoutSlot(ctx context.Context, gone seal.Slot, rest []seal.Slot) []string {
	if n.isTPM(gone) {
		if err := n.tpm.Revoke(ctx, halves([]seal.Slot{gone})); err != nil {
			return []string{"the slot is gone from the keyring; KEPT COPIES OF IT STILL OPEN WITH ITS TPM, which could not be told to refuse them: run kleidi reseal once it answers, and remove the slot again (" + err.Error() + ")"}
		}
		return []string{revokedByTPM}
	}
	if gone.Type == seal.TypeSkipped {
		return []string{"the place is gone from the keyring; there was no slot in it"}
	}
	changes := []string{"the slot is gone from the keyring; kept copies of it still open the KEK: run kleidi rotate"}
	if gone.Type == seal.TypeRecovery && !slices.ContainsFunc(rest, func(s seal.Slot) bool { return s.Type == seal.TypeRecovery }) {
		changes = append(changes, "NO RECOVERY SLOT IS LEFT: if the TPM or the machine fails, all Secrets are lost; run kleidi slot add recovery")
	}
	return changes
}

// someOpens opens slots until one of a wrapper that may open the keyring at start
// does; else it says why the last one did not, or that there is none. A suspension
// does not count: it ends. A slot for a next boot opens in that boot alone.
func (n *node) someOpens(ctx context.Context, k *keyring.Keyring, slots []seal.Slot) error {
	refusal := errors.New("it is the last slot that can open the keyring on this node; add another one first")
	for _, s := range slots {
		if !slices.Contains(n.cfg.Unlock.Order, s.Type) || s.Node != "" && s.Node != n.cfg.Node || n.suspends(s) {
			continue
		}
		err := n.tryOpen(ctx, s, k.CurrentID(), k.ClusterID())
		if err == nil {
			return nil
		}
		refusal = fmt.Errorf("no other slot opens the keyring on this node now: %w", n.gate.Explain(err))
	}
	return refusal
}

// rewrapSlot wraps the KEK anew where the slot is: by the newest version of its
// key, for the same boot state or recipients.
func (n *node) rewrapSlot(ctx context.Context, req admin.RewrapSlotRequest) (admin.KeyringState, error) {
	var bound string
	err := n.unlocker.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		slots := k.Slots()
		i, err := find(slots, req.Name)
		if err != nil {
			return nil, err
		}
		if d, ok := skippedBy(slots[i]); ok {
			return nil, errors.New("a rotation did without it, so there is nothing to rewrap; " + n.mend(d, slots))
		}
		rewrapped, err := n.rewrap(ctx, k, slots[i], req.NewKey)
		if err != nil {
			return nil, err
		}
		if err := rotation.ProveTryable(ctx, k.KEK(), []seal.Slot{rewrapped}, n.wrappers()); err != nil {
			return nil, err
		}
		slots[i] = rewrapped
		bound = n.binding(slots[i])
		next, err := k.WithSlots(slots)
		return []*keyring.Keyring{next}, err
	})
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("slot rewrap %s: %w", req.Name, err)
	}
	changes := []string{"the slot is wrapped anew: " + bound}
	if req.NewKey {
		changes = append(changes, "kept copies of the former one still open with the key that made it: run kleidi rotate")
	}
	return n.unchanged(changes...)
}

// rewrap has Vault rewrap its own ciphertext, so that the KEK doesn't travel; where
// it can't, and for all others, the open KEK is wrapped anew.
func (n *node) rewrap(ctx context.Context, k *keyring.Keyring, s seal.Slot, newKey bool) (seal.Slot, error) {
	if newKey {
		return n.rewrapByNewKey(ctx, k, s)
	}
	if s.Type == seal.TypeVault && n.vault != nil {
		if rewrapped, err := n.vault.Rewrap(ctx, s); err == nil {
			return rewrapped, nil
		}
	}
	slots, err := rotation.Like(n.proven(k), []seal.Slot{s})(ctx, k.KEK())
	if err != nil {
		return seal.Slot{}, err
	}
	return slots[0], nil
}

// testSlots opens slots for real and compares what comes out. What only the
// operator or another node can open is left aside, unless it is named.
func (n *node) testSlots(ctx context.Context, req admin.TestSlotsRequest) (admin.SlotTests, error) {
	k, err := n.unlocker.Keyring()
	if err != nil {
		return admin.SlotTests{}, err
	}
	slots := n.places(k.Slots())
	names := slotNames(slots)
	for _, name := range req.Names {
		if _, err := find(slots, name); err != nil {
			return admin.SlotTests{}, fmt.Errorf("slot test: %w", err)
		}
	}
	var r admin.SlotTests
	for i, s := range slots {
		if len(req.Names) > 0 && !slices.Contains(req.Names, names[i]) || len(req.Names) == 0 && n.wrapper(s.Type) == nil && s.Type != seal.TypeSkipped {
			continue
		}
		r.Slots = append(r.Slots, n.testSlot(ctx, k, names[i], s))
	}
	return r, nil
}

// secondHalf has the second wrapper of a two-of-two open its half, where the TPM can't
// open the other one yet.
func (n *node) secondHalf(ctx context.Context, k *keyring.Keyring, s seal.Slot) error {
	pair, ok := n.wrapper(s.Type).(*both.Wrapper)
	if !ok {
		return nil
	}
	err := pair.Holds(ctx, k.KEK(), s)
	if err == nil {
		return nil
	}
	return fmt.Errorf("for the next boot, and would not open in it: %w", seal.AddHint(err, "or run kleidi reseal --drop-next, and prepare the next boot again"))
}

// testSlot opens a slot. The result is what metrics and readyz show of it from then on.
func (n *node) testSlot(ctx context.Context, k *keyring.Keyring, name string, s seal.Slot) admin.SlotTest {
	start := time.Now()
	t := admin.SlotTest{Name: name}
	err := n.tryPlace(ctx, k.Slots(), s, k.CurrentID(), k.ClusterID())
	t.Opens, t.Duration, t.Use = err == nil, time.Since(start), n.use(s)
	if t.ForNextBoot = t.Use == uses[tpm.UseNext] && seal.CauseOf(err) == seal.CauseBootState; !t.ForNextBoot {
		t.Problem = admin.ProblemOf(n.gate.Explain(err))
	} else if err := n.secondHalf(ctx, k, s); err != nil {
		t.ForNextBoot, t.Problem = false, admin.ProblemOf(err)
	}
	if half := ofVault(s); half.Type == seal.TypeVault && n.vault != nil {
		warnings, err := n.vault.Check(ctx, half)
		if err != nil && t.Opens {
			warnings = append(warnings, err.Error())
		}
		t.Warnings = warnings
	}
	if n.secondary(s) && ctx.Err() == nil { // else it is who asked that has gone
		n.tests.record(n.openSlots, s, t)
	}
	return t
}

// openSlots returns the slots of the open keyring; none where kleidi is locked.
func (n *node) openSlots() []seal.Slot {
	k, err := n.unlocker.Keyring()
	if err != nil {
		return nil
	}
	return k.Slots()
}

// tryPlace opens one of slots, or says why there is none in its place.
func (n *node) tryPlace(ctx context.Context, slots []seal.Slot, s seal.Slot, id seal.KeyID, cluster seal.ClusterID) error {
	if d, ok := skippedBy(s); ok {
		return n.missing(d, slots)
	}
	return n.tryOpen(ctx, s, id, cluster)
}

// tryOpen has the slot's wrapper open it, and forgets what came out once its key ID
// is compared.
func (n *node) tryOpen(ctx context.Context, s seal.Slot, id seal.KeyID, cluster seal.ClusterID) error {
	w := n.wrapper(s.Type)
	if w == nil {
		return seal.Errorf(seal.CauseNoSlot, "configure its wrapper; a recovery slot opens with kleidi keyring verify --identity-file", "nothing here can open it")
	}
	kek, err := w.Unwrap(ctx, s)
	if errors.Is(err, seal.ErrNotMine) {
		return seal.Errorf(seal.CauseNoSlot, "see node and the wrapper's settings in the configuration", "the slot is for another node, token or key than the configured one")
	}
	if err != nil {
		return err
	}
	defer kek.Close()
	if got := keyring.NewKeyID(cluster, kek); got != id {
		return seal.Errorf(seal.CauseSlotCorrupt, "run kleidi slot rewrap, kleidi keyring restore, or kleidi recover", "it holds the KEK of key ID %s", got)
	}
	return nil
}
