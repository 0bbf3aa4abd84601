package status

import (
	"context"
	"errors"
	"io/fs"
	"maps"
	"slices"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/rollout"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/internal/version"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/unlock"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

// Report returns the slots, what they are sealed to, and the state of kleidi. Unless
// the request says which slots to try, it reads only memory and the stored keyring.
func Report(ctx context.Context, n *node.Node, req admin.StatusRequest) (admin.StatusReport, error) {
	state := n.Unlocker.State()
	r := admin.StatusReport{
		Version: version.String(), Node: n.Config.Node, State: admin.Locked, Since: state.Since, NextAttempt: state.Next,
		Problem: admin.ProblemOf(state.Problem),
	}
	r.TPMOpenTo = n.TPMOpenTo()
	var slots []seal.Slot
	if k, err := n.Unlocker.Keyring(); err == nil {
		r.State, r.Memory = admin.Open, k.KEK().Kind()
		r.Wrapper, r.Fallback, r.Staged = state.Wrapper, admin.ProblemOf(state.Fallback), admin.ProblemOf(state.Staged)
		describe(&r, k.Info())
		r.Cluster = rollout.Cluster(n, k)
		slots = k.Slots()
	} else if u, _, err := n.Stored(ctx); err == nil {
		describe(&r, u.Info()) // nothing has authenticated the keyring
		slots = u.Slots()
	} else if errors.Is(err, fs.ErrPermission) {
		return r, err // the caller may not know the reason
	} else {
		r.Problem = admin.ProblemOf(err)
	}
	if r.Suspension = Suspension(n, slots); r.Suspension != nil && req.Try != admin.TryNone {
		r.Suspension.BootsLeft = bootsLeft(ctx, n, slots)
	}
	var attestation, unready error
	if req.Try != admin.TryNone && len(slots) > 0 {
		if unready = n.LockMemory(); unready == nil {
			attestation = n.Attest(ctx, slots)
		}
	}
	r.Unrevoked, r.ChangedOutside = unrevoked(n, slots), changedOutside(ctx, n, r.ClusterID, slots)
	if slots = slotview.WithoutDebts(slots); len(slots) > 0 {
		slots = n.View.WithMissing(slots)
	}
	names, ids := slotview.Names(slots), slotview.IDs(slots)
	for i, s := range slots {
		try := req.Try
		if unready != nil {
			try = admin.TryNone
		}
		report := reportSlot(ctx, n, slots, s, r.CurrentKeyID, r.ClusterID, try, attestation)
		report.NotTried = req.Try == admin.TryTPM && slotview.HasBackend(s.Type)
		if unready != nil && s.Type != seal.TypeSkipped {
			report.Problem = admin.ProblemOf(unready)
		}
		report.Name, report.ID = names[i], ids[i]
		if report.SelfTest = n.SelfTests.Of(s); report.SelfTest != nil {
			report.SelfTest.Name = report.Name // the name depends on the other slots
		}
		r.Slots = append(r.Slots, report)
	}
	if attestation == nil { // otherwise this one is newer than the last attempt's
		attestation = onlyAttestation(state.Problem)
	}
	r.Attestation = reportAttestation(n, attestation)
	return r, nil
}

// unrevoked returns the former slots whose copies still open.
func unrevoked(n *node.Node, slots []seal.Slot) (all []admin.Unrevoked) {
	for _, d := range n.View.Debts(slots) {
		all = append(all, admin.Unrevoked{
			EK: d.EK, EpochIndex: d.Index, UpToEpoch: d.AtMost, Since: d.Since,
			Message: "kept copies of former slots " + d.Describe(), Hint: d.Remedy(),
		})
	}
	return all
}

// changedOutside returns the changes of the slots that no command on this node made.
func changedOutside(ctx context.Context, n *node.Node, cluster string, slots []seal.Slot) (all []admin.OutsideChange) {
	if cluster == "" {
		return nil
	}
	c := n.Slots.Outside(ctx, cluster, slots)
	for _, w := range c.Added {
		all = append(all, admin.OutsideChange{Change: "added", Slot: w.Slot, ID: w.ID})
	}
	for _, w := range c.Removed {
		all = append(all, admin.OutsideChange{Change: "removed", Slot: w.Slot, ID: w.ID})
	}
	return all
}

// bootsLeft returns the number of boots that a suspension still lasts, or nil if the TPM
// does not say.
func bootsLeft(ctx context.Context, n *node.Node, slots []seal.Slot) *int64 {
	states := n.View.BootStates(slots, tpm.UseSuspend)
	count, err := keys.ResetCount(ctx, n.Gate.Device, n.Gate.Owner)
	if err != nil || len(states) == 0 {
		return nil
	}
	left := max(int64(states[0].Resets)-int64(count), 0)
	return &left
}

func onlyAttestation(err error) error {
	if cause := seal.CauseOf(err); cause == seal.CauseAttestation || cause == seal.CauseBootPolicy {
		return err
	}
	return nil
}

func describe(r *admin.StatusReport, i keyring.Info) {
	r.ClusterID, r.CurrentKeyID, r.Revision = i.ClusterID.String(), i.Current.KeyID, i.Revision
	r.Keys = append(r.Keys, admin.KeyReport{KeyID: i.Current.KeyID, Role: "current", Created: i.Current.Created})
	if i.Staged != nil {
		r.Keys = append(r.Keys, admin.KeyReport{KeyID: i.Staged.KeyID, Role: "staged", Created: i.Staged.Created})
	}
	for _, k := range slices.Backward(i.Retired) {
		r.Keys = append(r.Keys, admin.KeyReport{KeyID: k.KeyID, Role: "retired", Created: k.Created, Retired: k.Retired})
	}
}

func reportSlot(ctx context.Context, n *node.Node, slots []seal.Slot, s seal.Slot, id seal.KeyID, cluster string, try admin.Try, attestation error) admin.SlotReport {
	r := admin.SlotReport{Type: s.Type, Node: s.Node, Binding: n.View.Binding(s), Use: n.View.Use(s), Verifier: n.View.Verified(s)}
	r.Signer, r.Generation = n.View.Signer(s, cluster)
	if d, ok := slotview.MissingOf(s); ok {
		r.Opens, r.Problem = new(bool), admin.ProblemOf(n.View.WhyMissing(d, slots))
		return r
	}
	if try == admin.TryNone || try == admin.TryTPM && slotview.HasBackend(s.Type) || n.Wrapper(s.Type) == nil || s.Node != "" && s.Node != n.Config.Node {
		return r
	}
	var err error
	if n.View.OfThisTPM(s) || n.Config.Unlock.RequireAttestation {
		err = attestation
	}
	if o, ok := errors.AsType[unlock.Overruled](attestation); ok && o.Overrules(s) {
		err = nil
	}
	if c, parseErr := seal.ParseClusterID(cluster); err == nil {
		if err = parseErr; err == nil {
			err = n.TryOpen(ctx, s, id, c)
		}
	}
	opens := err == nil
	if r.Use == slotview.UseNames[tpm.UseNext] && seal.CauseOf(err) == seal.CauseBootState {
		err = nil // the slot is for another boot
	}
	r.Opens, r.Problem = &opens, admin.ProblemOf(n.Advise(ctx, n.Gate.Explain(err)))
	return r
}

func reportAttestation(n *node.Node, problem error) *admin.AttestationReport {
	last := n.Gate.Last()
	if last == nil && problem == nil {
		return nil
	}
	r := &admin.AttestationReport{Passed: problem == nil, Problem: admin.ProblemOf(problem)}
	if last != nil {
		r.Time, r.Boot, r.Bank = last.Time, string(last.Log.BootType()), eventlog.BankName(last.Bank)
		r.PCRs = slices.Sorted(maps.Keys(last.PCRs))
	}
	return r
}

// Suspension describes the slot that opens this node's keyring while it is suspended, or
// returns nil. It asks no TPM.
func Suspension(n *node.Node, slots []seal.Slot) *admin.Suspension {
	for _, s := range slots {
		if n.View.Suspends(s) {
			return &admin.Suspension{Binding: n.View.Binding(s)}
		}
	}
	return nil
}

// Alone is Report without a running serve. No keyring is open then, which is not a
// problem to show. It tries no token and no server, because a try has a price, and the
// next call would repeat it.
func Alone(ctx context.Context, n *node.Node, req admin.StatusRequest) (admin.StatusReport, error) {
	if req.Try == admin.TryAll {
		req.Try = admin.TryTPM
	}
	r, err := Report(ctx, n, req)
	if seal.CauseOf(r.Problem.Err()) == seal.CauseStarting {
		r.Problem = &admin.Problem{Message: "kleidi serve does not run", Hint: "start it: systemctl start kleidi"}
	}
	r.Since = time.Time{}
	return r, err
}
