package attest

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"encoding/json"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
	"github.com/beezy-dev/kleidi/tpm/bootrule"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// Gate attests this machine to itself before a TPM slot is opened or made.
type Gate struct {
	Attester
	// Node is the name of this machine; slots of other nodes demand nothing of it.
	Node string
	// Counter is the epoch counter in the slots' authorization policies.
	Counter tpm.Counter
	// Bank and PCRs are the bank and the PCRs to seal to. If PCRs is empty, the way in
	// which the machine boots decides.
	Bank crypto.Hash
	PCRs []int
	// AnySigned receives what a boot state leaves open if only Secure Boot's keys
	// decide that part. If nil, such boot states are refused.
	AnySigned func(bootrule.Binding)
	// BootPolicy reads the demands on the event log; nil demands nothing.
	BootPolicy func() (*bootpolicy.BootPolicy, error)
	// BootPolicyFile is the file of the boot policy, for hints.
	BootPolicyFile string
	// Always demands that the machine is attested before any slot, not only before the TPM's.
	Always bool
	// Phase is the phase of the boot in which slots are made, if systemd measures phases:
	// PCR 11 has a different value in each.
	Phase string

	last   atomic.Pointer[Result]
	failed atomic.Bool
}

const nonceSize = 32 // bytes

// demand is a set of PCRs by bank.
type demand map[crypto.Hash]map[int]bool

func (d demand) add(bank crypto.Hash, pcrs []int) {
	if d[bank] == nil {
		d[bank] = map[int]bool{}
	}
	for _, i := range pcrs {
		d[bank][i] = true
	}
}

// attest quotes the PCRs that d and the boot policy demand, and verifies the evidence.
// It returns the result for bank, and the boot policy's objection, if any.
func (g *Gate) attest(ctx context.Context, srk []byte, bank crypto.Hash, d demand) (result *Result, refusal, err error) {
	result, refusal, err = g.judged(ctx, srk, bank, d)
	g.failed.Store(err != nil || refusal != nil)
	if err == nil && result != nil {
		g.last.Store(result)
	}
	return result, refusal, err
}

func (g *Gate) judged(ctx context.Context, srk []byte, bank crypto.Hash, d demand) (result *Result, refusal, err error) {
	policy, err := g.bootPolicy()
	if err != nil {
		return nil, nil, err
	}
	if policy != nil {
		d.add(policy.Hash(), policy.Demanded())
	}
	results := map[crypto.Hash]*Result{}
	for bank, pcrs := range d {
		if results[bank], err = g.verified(ctx, srk, bank, slices.Sorted(maps.Keys(pcrs))); err != nil {
			return nil, nil, err
		}
	}
	if policy != nil {
		refusal = g.allowed(policy, results[policy.Hash()])
	}
	return results[bank], refusal, nil
}

func (g *Gate) bootPolicy() (*bootpolicy.BootPolicy, error) {
	if g.BootPolicy == nil {
		return nil, nil
	}
	p, err := g.BootPolicy()
	if err != nil {
		return nil, seal.Caused(seal.CauseAttestation, "correct the file that tpm.bootPolicy names, or record one from a boot that you trust: run kleidi bootpolicy record --file NEW", "boot policy", err)
	}
	return p, nil
}

// allowed judges a boot by exactly those of its PCRs that the boot policy demands.
func (g *Gate) allowed(p *bootpolicy.BootPolicy, r *Result) error {
	v := bootpolicy.Judge(p, r.Log, r.only(p.Demanded()))
	if v.Accepted {
		return nil
	}
	refusal := &bootpolicy.RefusedError{Verdict: v}
	hint := refusal.Hint()
	if refusal.Left() > 0 {
		hint = "run kleidi bootpolicy check --boot-policy " + seal.Quote(g.BootPolicyFile) + " --event-log " + seal.Quote(g.Logs.Firmware) + g.Logs.userspaceFlag() + " to list every finding; " + hint
	}
	if restart := r.Log.Restarted(); restart != eventlog.NoRestart {
		hint = restart.String() + ": " + hintReboot + "; if it stays locked, " + hint
	}
	return &seal.Error{Cause: seal.CauseBootPolicy, Err: refusal, Hint: hint}
}

func (g *Gate) verified(ctx context.Context, srk []byte, bank crypto.Hash, pcrs []int) (*Result, error) {
	nonce := make([]byte, nonceSize)
	rand.Read(nonce)
	evidence, err := g.Collect(ctx, srk, nonce, bank, pcrs)
	if err != nil {
		return nil, err
	}
	result, err := Verify(evidence, nonce, bank, pcrs)
	if err != nil {
		return nil, refuse(err)
	}
	return result, nil
}

// Attest gathers and verifies fresh evidence over the PCRs that the TPM slots among
// slots demand. An unreadable slot demands nothing; the attempt to open it reports the
// fault.
func (g *Gate) Attest(ctx context.Context, slots []seal.Slot) error {
	d, suspended := demand{}, false
	var srk []byte
	bank := g.Bank
	for _, s := range slots {
		if s.Type != seal.TypeTPM || s.Node != g.Node {
			continue
		}
		demanded, err := tpm.DemandOf(s, g.Counter)
		if err != nil {
			continue
		}
		srk, bank = demanded.SRK, demanded.State.Bank
		suspended = suspended || demanded.State.Use == tpm.UseSuspend
		d.add(bank, slices.Collect(maps.Keys(demanded.State.Values)))
		if demanded.State.Use != tpm.UseSigned {
			continue
		}
		if pcrs, err := g.ChoosePCRs(); err == nil { // the signed PCRs are among these
			d.add(bank, pcrs)
		}
	}
	if len(d) == 0 && g.Always {
		pcrs, err := g.ChoosePCRs()
		if err != nil {
			g.failed.Store(true)
			return err
		}
		d.add(bank, pcrs)
	}
	_, refusal, err := g.attest(ctx, srk, bank, d)
	switch {
	case err != nil:
		return err
	case refusal != nil && suspended:
		return &overruled{refusal, g}
	}
	return refusal
}

// overruled is the boot policy's objection to a boot while a slot says that the node is
// suspended. It implements unlock.Overruled.
type overruled struct {
	error
	gate *Gate
}

// Unwrap returns the refusal.
func (o *overruled) Unwrap() error { return o.error }

// Overrules reports whether a slot may still be tried: only the slot of a suspension,
// whose boots the TPM counts. The TPM, not this check, enforces what the slot says.
func (o *overruled) Overrules(s seal.Slot) bool {
	d, err := tpm.DemandOf(s, o.gate.Counter)
	return s.Type == seal.TypeTPM && s.Node == o.gate.Node && err == nil && d.State.Use == tpm.UseSuspend
}

// CheckPhase refuses to seal in any other phase of the boot than the one in which
// kleidi serve starts: a slot sealed in another phase would not open there.
func (g *Gate) CheckPhase(log *eventlog.Log) error {
	phases := log.Phases()
	if restart := log.Restarted(); restart != eventlog.NoRestart {
		return seal.Errorf(seal.CauseAttestation, hintReboot, "a KEK sealed now would not open after the next boot: %v", restart)
	}
	if g.Phase == "" || len(phases) == 0 || phases[len(phases)-1] == g.Phase {
		return nil
	}
	return seal.Errorf(seal.CauseAttestation, "run it while the machine is up, or set tpm.phase to the phase in which kleidi serve starts",
		"the boot is in phase %q, and slots are made in phase %q", phases[len(phases)-1], g.Phase)
}

// only returns the values of some of the quoted PCRs: the boot policy may have
// demanded more of them.
func (r *Result) only(pcrs []int) eventlog.PCRs {
	values := eventlog.PCRs{}
	for _, i := range pcrs {
		values[i] = r.PCRs[i]
	}
	return values
}

// maxRecord bounds a slot's record of its boot, in bytes: a slot must fit into a
// keyring, and a GRUB menu measures hundreds of commands.
const maxRecord = seal.MaxSlotData / 2

// record returns a slot's record of how the machine booted. If the events are too long,
// it keeps only their digests, and if the digests are too long, nothing. A record
// explains, and decides nothing.
func record(events []eventlog.Summary) (json.RawMessage, error) {
	b, err := json.Marshal(events)
	if err != nil || len(b) <= maxRecord {
		return b, err
	}
	for i := range events {
		events[i].What = ""
	}
	if b, err = json.Marshal(events); len(b) > maxRecord {
		return nil, err
	}
	return b, err
}

// AttestPCRs gathers and verifies fresh evidence over these PCRs of the configured bank.
func (g *Gate) AttestPCRs(ctx context.Context, pcrs []int) (*Result, error) {
	d := demand{}
	d.add(g.Bank, pcrs)
	r, refusal, err := g.attest(ctx, nil, g.Bank, d)
	if err == nil {
		err = refusal
	}
	return r, err
}

// ChoosePCRs returns the configured PCRs, or the PCRs for the boot type. The boot type
// comes from a log that is not verified yet; the quote over the chosen PCRs verifies
// the log next.
func (g *Gate) ChoosePCRs() ([]int, error) {
	if len(g.PCRs) > 0 {
		return g.PCRs, nil
	}
	log, err := g.Logs.Read()
	if err != nil {
		return nil, err
	}
	if pcrs := log.BootType().PCRs(log); len(pcrs) > 0 {
		return pcrs, nil
	}
	b := bootrule.Of(log, bootrule.Decisive())
	return nil, seal.Errorf(seal.CauseBootState, g.remedy(b), "%w", b.Check(bootrule.WholeBoot))
}

// Last returns the newest result, or nil.
func (g *Gate) Last() *Result { return g.last.Load() }

// Passed reports whether the last attestation verified; false before the first.
func (g *Gate) Passed() bool { return g.Last() != nil && !g.failed.Load() }

// Explain adds to a refusal by the TPM what has changed since the slot was made: which
// PCR, which event, and the usual cause. It returns other errors unchanged.
func (g *Gate) Explain(err error) error {
	var state *tpm.StateError
	var refusal *seal.Error
	now := g.Last()
	if now == nil || !errors.As(err, &state) || !errors.As(err, &refusal) {
		return err
	}
	differences := Compare(&state.Was, now)
	if len(differences) == 0 {
		return err
	}
	explained := *refusal
	if slices.ContainsFunc(differences, eventlog.Difference.IsRestart) {
		if explained.Hint, explained.NoRecovery = hintReboot, ""; len(differences) > 1 {
			explained.Hint += "; if it stays locked, " + refusal.Hint
			if refusal.NoRecovery != "" {
				explained.NoRecovery = hintReboot + "; if it stays locked, " + refusal.NoRecovery
			}
		}
	}
	var recorded []eventlog.Summary
	_ = json.Unmarshal(state.Was.Record, &recorded) // unreadable is no record
	explained.Err = &Explained{Differences: differences, headline: eventlog.Headline(differences, eventlog.BootTypeOf(recorded), now.Log.BootType()), err: refusal.Err}
	return &explained
}

// Explained is a refusal with an explanation of what changed.
type Explained struct {
	Differences []eventlog.Difference
	headline    string
	err         error
}

// Error returns the headline and the details in one line.
func (e *Explained) Error() string { return e.Headline() + ": " + strings.Join(e.Details(), "; ") }

// Headline says what happened in one sentence.
func (e *Explained) Headline() string { return e.headline }

// Details names each PCR that differs, with its event.
func (e *Explained) Details() []string {
	var details []string
	for _, d := range e.Differences {
		details = append(details, d.String())
	}
	return details
}

// Unwrap returns the TPM's error.
func (e *Explained) Unwrap() error { return e.err }

// Compare compares a slot's boot state with a verified boot state of the same bank. The
// slot's record is as untrusted as the slot, so Compare uses it only for PCRs where the
// recorded digests lead to the slot's values.
func Compare(was *tpm.BootState, now *Result) []eventlog.Difference {
	if was.Bank != now.Bank {
		return nil
	}
	var recorded []eventlog.Summary
	if len(was.Record) > 0 && json.Unmarshal(was.Record, &recorded) != nil {
		recorded = nil
	}
	proven := provenBy(was, now.Log, recorded)
	events := now.Log.Summarize(now.Bank, proven)
	recorded = slices.DeleteFunc(recorded, func(s eventlog.Summary) bool { return !slices.Contains(proven, s.PCR) })
	return eventlog.Compare(recorded, events, was.Values, now.PCRs)
}

// provenBy returns the PCRs of a boot state whose values the recorded events lead to.
// It assumes that the TPM was started from the same locality as now.
func provenBy(was *tpm.BootState, log *eventlog.Log, recorded []eventlog.Summary) []int {
	locality, err := log.StartupLocality()
	if err != nil {
		return nil
	}
	values, err := eventlog.ReplaySummary(recorded, was.Bank, locality)
	if err != nil {
		return nil
	}
	var proven []int
	for _, pcr := range slices.Sorted(maps.Keys(was.Values)) {
		if bytes.Equal(values[pcr], was.Values[pcr]) {
			proven = append(proven, pcr)
		}
	}
	return proven
}
