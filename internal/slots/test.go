package slots

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/both"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/tpm"
)

// Test really opens slots and compares the results. It skips slots that only the
// operator or another node can open, unless they are named.
func Test(ctx context.Context, n *node.Node, req admin.TestSlotsRequest) (admin.SlotTests, error) {
	k, err := n.Unlocker.Keyring()
	if err != nil {
		return admin.SlotTests{}, err
	}
	slots := n.View.WithMissing(k.Slots())
	names := slotview.Names(slots)
	wanted, err := slotview.Places(slots, req.Names)
	if err != nil {
		return admin.SlotTests{}, fmt.Errorf("slot test: %w", err)
	}
	var r admin.SlotTests
	for i, s := range slots {
		if len(wanted) > 0 && !slices.Contains(wanted, i) || len(wanted) == 0 && n.Wrapper(s.Type) == nil && s.Type != seal.TypeSkipped {
			continue
		}
		r.Slots = append(r.Slots, TestOne(ctx, n, k, names[i], s))
	}
	return r, nil
}

// checker is a wrapper that finds faults that may keep a slot from opening in the future.
type checker interface {
	Check(ctx context.Context, slot seal.Slot) (warnings []string, err error)
}

// TestOne opens a slot. Metrics and readyz show the result from then on.
func TestOne(ctx context.Context, n *node.Node, k *keyring.Keyring, name string, s seal.Slot) admin.SlotTest {
	start := time.Now()
	t := admin.SlotTest{Name: name}
	err := n.TryOpenOrMissing(ctx, k.Slots(), s, k.CurrentID(), k.ClusterID())
	t.Opens, t.Duration, t.Use = err == nil, time.Since(start), n.View.Use(s)
	if t.ForNextBoot = t.Use == slotview.UseNames[tpm.UseNext] && seal.CauseOf(err) == seal.CauseBootState; !t.ForNextBoot {
		t.Problem = admin.ProblemOf(n.Advise(ctx, n.Gate.Explain(err)))
	} else if err := testSecond(ctx, n, k, s); err != nil {
		t.ForNextBoot, t.Problem = false, admin.ProblemOf(err)
	}
	part := slotview.BackendPart(s)
	if w, ok := n.Wrapper(part.Type).(checker); ok {
		warnings, err := w.Check(ctx, part)
		if err != nil && t.Opens {
			warnings = append(warnings, err.Error())
		}
		t.Warnings = warnings
	}
	if SelfTested(n, s) && ctx.Err() == nil { // otherwise the caller has gone away
		n.SelfTests.Record(n.OpenSlots, s, t)
	}
	return t
}

// testSecond lets the second wrapper of a two-of-two open its half if the TPM can't open
// the other half yet.
func testSecond(ctx context.Context, n *node.Node, k *keyring.Keyring, s seal.Slot) error {
	pair, ok := n.Wrapper(s.Type).(*both.Wrapper)
	if !ok {
		return nil
	}
	err := pair.Holds(ctx, k.KEK(), s)
	if err == nil {
		return nil
	}
	return fmt.Errorf("for the next boot, and would not open in it: %w", seal.AddHint(err, "or run kleidi reseal --drop-next, and prepare the next boot again"))
}

// SelfTested reports whether the self-test opens a slot: a slot of a wrapper other than
// the TPM's, alone or together with the TPM in the running boot.
func SelfTested(n *node.Node, s seal.Slot) bool {
	return slotview.IsSecondary(s.Type) || slotview.Second(s.Type) != "" && n.View.Use(s) == slotview.UseNames[tpm.UsePresent]
}

// Unusable returns the self-test's results for the present slots, and the missing
// slots, which nothing opens.
func Unusable(n *node.Node, k *keyring.Keyring) []admin.SlotTest {
	slots := n.View.WithMissing(k.Slots())
	failed := n.SelfTests.Failed(slots)
	for i, name := range slotview.Names(slots) {
		if d, ok := slotview.MissingOf(slots[i]); ok {
			failed = append(failed, admin.SlotTest{Name: name, Problem: admin.ProblemOf(n.View.WhyMissing(d, slots))})
		}
	}
	return failed
}
