package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/hsm"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/both"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/recovery"
	"github.com/beezy-dev/kleidi/seal/unlock"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/vault"
)

// status reports what is sealed to what. With Try it has the TPM open each slot
// of this node; else nothing but memory and the stored keyring is looked at.
func (n *node) status(ctx context.Context, req admin.StatusRequest) (admin.StatusReport, error) {
	state := n.unlocker.State()
	r := admin.StatusReport{
		Version: version(), Node: n.cfg.Node, State: admin.Locked, Since: state.Since, NextAttempt: state.Next,
		Problem: admin.ProblemOf(state.Problem),
	}
	var slots []seal.Slot
	if k, err := n.unlocker.Keyring(); err == nil {
		r.State, r.Memory = admin.Open, k.KEK().Kind()
		r.Wrapper, r.Fallback, r.Staged = state.Wrapper, admin.ProblemOf(state.Fallback), admin.ProblemOf(state.Staged)
		describe(&r, k.Info())
		slots = k.Slots()
	} else if u, _, err := n.stored(ctx); err == nil {
		describe(&r, u.Info()) // nothing has vouched for it
		slots = u.Slots()
	} else {
		r.Problem = admin.ProblemOf(err)
	}
	if r.Suspension = n.suspension(slots); r.Suspension != "" && req.Try {
		r.Suspension += n.bootsLeft(ctx, slots)
	}
	var attestation, unready error
	if req.Try && len(slots) > 0 {
		if unready = n.ready(); unready == nil {
			attestation = preflight{n.gate, n.attests()}.Attest(ctx, slots)
		}
	}
	if len(slots) > 0 {
		slots = n.places(slots)
	}
	names := slotNames(slots)
	for i, s := range slots {
		report := n.reportSlot(ctx, slots, s, r.CurrentKeyID, r.ClusterID, req.Try && unready == nil, attestation)
		if unready != nil && s.Type != seal.TypeSkipped {
			report.Problem = admin.ProblemOf(unready)
		}
		report.Name = names[i]
		r.Slots = append(r.Slots, report)
	}
	r.Attestation = n.reportAttestation(errors.Join(attestation, onlyAttestation(state.Problem)))
	return r, nil
}

// suspension says what this node opens under while it is suspended; "" where it
// isn't.
func (n *node) suspension(slots []seal.Slot) string {
	for _, s := range slots {
		if n.suspends(s) {
			return "suspended: anyone who boots this machine with the same " + n.binding(s) + " gets the KEK; run kleidi reseal to end this"
		}
	}
	return ""
}

// bootsLeft says how many boots more a suspension lasts, as far as the TPM tells.
func (n *node) bootsLeft(ctx context.Context, slots []seal.Slot) string {
	count, err := n.gate.Device.ResetCount(ctx, n.gate.Owner)
	for _, s := range n.states(slots, tpm.UseSuspend) {
		if err == nil {
			return fmt.Sprintf(" (boots left: %d)", max(int64(s.Resets)-int64(count), 0))
		}
	}
	return ""
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

func (n *node) reportSlot(ctx context.Context, slots []seal.Slot, s seal.Slot, id seal.KeyID, cluster string, try bool, attestation error) admin.SlotReport {
	r := admin.SlotReport{Type: s.Type, Node: s.Node, Binding: n.binding(s), Use: n.use(s)}
	r.Signer, r.Generation = n.signer(s, cluster)
	if d, ok := skippedBy(s); ok {
		r.Opens, r.Problem = new(bool), admin.ProblemOf(n.missing(d, slots))
		return r
	}
	if !try || n.wrapper(s.Type) == nil || s.Node != "" && s.Node != n.cfg.Node {
		return r
	}
	var err error
	if n.isTPM(s) || n.cfg.Unlock.RequireAttestation {
		err = attestation
	}
	if o, ok := errors.AsType[unlock.Overruled](attestation); ok && o.Overrules(s) {
		err = nil
	}
	if c, parseErr := seal.ParseClusterID(cluster); err == nil {
		if err = parseErr; err == nil {
			err = n.tryOpen(ctx, s, id, c)
		}
	}
	opens := err == nil
	if r.Use == uses[tpm.UseNext] && seal.CauseOf(err) == seal.CauseBootState {
		err = nil // it is for another boot
	}
	r.Opens, r.Problem = &opens, admin.ProblemOf(n.gate.Explain(err))
	return r
}

// binding says in one line what a slot is sealed to.
func (n *node) binding(s seal.Slot) string {
	switch s.Type {
	case seal.TypeTPM:
		d, err := tpm.DemandOf(s, n.gate.Counter)
		if err != nil {
			return "unreadable"
		}
		s := fmt.Sprintf("PCR %s (%s), up to epoch %d", join(slices.Sorted(maps.Keys(d.State.Values))), eventlog.BankName(d.State.Bank), d.AtMost)
		if d.State.Use == tpm.UseSuspend {
			s += fmt.Sprintf(", up to reset %d of the TPM", d.State.Resets)
		}
		return s
	case seal.TypeRecovery:
		recipients, err := recovery.Recipients(s)
		if err != nil {
			return "unreadable"
		}
		return "age " + strings.Join(recipients, ", ")
	case seal.TypePKCS11:
		return hsm.Describe(s)
	case seal.TypeVault:
		return vault.Describe(s)
	case seal.TypeTPMAndPKCS11, seal.TypeTPMAndVault:
		first, second, err := both.Parts(s)
		if err != nil {
			return "unreadable"
		}
		return n.binding(first) + ", and " + n.binding(second)
	case seal.TypeSkipped:
		d, _ := skippedBy(s)
		if d.Since.IsZero() {
			return "no slot, although unlock.order names it"
		}
		return "left out by the rotation of " + d.Since.Local().Format(time.DateTime)
	default:
		return ""
	}
}

// uses names what slots are for, to people.
var uses = map[tpm.Use]string{tpm.UsePresent: "present", tpm.UseNext: "next", tpm.UseSuspend: "suspend", tpm.UseSigned: "signed"}

// use says what a slot is for; "" for others than the TPM's.
func (n *node) use(s seal.Slot) string {
	if d, err := tpm.DemandOf(ofTPM(s), n.gate.Counter); ofTPM(s).Type == seal.TypeTPM && err == nil {
		return uses[d.State.Use]
	}
	return ""
}

// what says in one line what a slot of the TPM opens in.
func (n *node) what(s seal.Slot) string {
	switch n.use(s) {
	case "next":
		return "the next boot state: " + n.binding(s)
	case "suspend":
		return "any boot that leaves these as they are: " + n.binding(s)
	case "signed":
		return "signed boot states, with " + n.binding(s)
	}
	return "the present boot state: " + n.binding(s)
}

func joinWords(words []string) string { return strings.Join(words, ", ") }

func join(pcrs []int) string {
	return strings.Trim(strings.ReplaceAll(fmt.Sprint(pcrs), " ", ", "), "[]")
}

func (n *node) reportAttestation(problem error) *admin.AttestationReport {
	last := n.gate.Last()
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

// offlineStatus is status without a running serve: nothing is open, and that is
// not the problem to show.
func (n *node) offlineStatus(ctx context.Context, req admin.StatusRequest) (admin.StatusReport, error) {
	r, err := n.status(ctx, req)
	if seal.CauseOf(r.Problem.Err()) == seal.CauseStarting {
		r.Problem = &admin.Problem{Message: "kleidi serve does not run", Hint: "start it: systemctl start kleidi"}
	}
	r.Since = time.Time{}
	return r, err
}
