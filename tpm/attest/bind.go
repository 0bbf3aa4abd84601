package attest

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/bootrule"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// Every boot state that a slot is sealed to comes from a method of [Gate] in this file,
// and only after package bootrule found that the PCRs hold everything that decides the
// boot.

const (
	secureBootPCR = 7 // the state and the keys of Secure Boot
	handOverPCR   = 9 // the initrd and command line that the kernel received
)

// State returns the attested boot state to seal to: the quoted values of the PCRs for
// the way in which this machine boots, and the events that led to them.
func (g *Gate) State(ctx context.Context) (tpm.BootState, error) {
	r, pcrs, err := g.present(ctx)
	if err != nil {
		return tpm.BootState{}, err
	}
	if err := g.checkPCRs(r.Log, pcrs); err != nil {
		return tpm.BootState{}, err
	}
	return r.state(pcrs, tpm.UsePresent)
}

// Next returns the boot state that a predicted log leads to.
func (g *Gate) Next(log *eventlog.Log, pcrs []int) (tpm.BootState, error) {
	if err := g.checkPCRs(log, pcrs); err != nil {
		return tpm.BootState{}, err
	}
	return Predicted(log, g.Bank, pcrs)
}

// Predicted returns the boot state that a predicted log leads to, for an operator's key
// to sign. It need not hold Secure Boot, because the slot for signed boot states does,
// see [Gate.Signable].
func Predicted(log *eventlog.Log, bank crypto.Hash, pcrs []int) (tpm.BootState, error) {
	values, err := log.Replay(bank)
	if err != nil {
		return tpm.BootState{}, err
	}
	return (&Result{Log: log, Bank: bank, PCRs: values}).state(pcrs, tpm.UseNext)
}

// Suspended returns the present boot state without the PCRs in letGo; an empty letGo
// means all PCRs but 7. The remaining PCRs must hold the boot, or Secure Boot must hold
// it.
func (g *Gate) Suspended(ctx context.Context, letGo []int) (tpm.BootState, error) {
	r, pcrs, err := g.present(ctx)
	if err != nil {
		return tpm.BootState{}, err
	}
	for _, i := range letGo {
		if !slices.Contains(pcrs, i) {
			return tpm.BootState{}, fmt.Errorf("--weaken %d: the KEK is sealed to PCR %s; name some of these", i, list(pcrs))
		}
	}
	kept := slices.DeleteFunc(slices.Clone(pcrs), func(i int) bool {
		return len(letGo) == 0 && i != secureBootPCR || slices.Contains(letGo, i)
	})
	if len(kept) == 0 {
		return tpm.BootState{}, errors.New("nothing would be left to seal to; name fewer PCRs in --weaken, or rely on the recovery identity")
	}
	err = bootrule.Check(r.Log, kept, bootrule.SignedBoot)
	if err != nil && !slices.Contains(pcrs, handOverPCR) { // it holds the command line if PCR 7 is let go
		more := append(kept, handOverPCR)
		slices.Sort(more)
		if wider, failed := g.AttestPCRs(ctx, more); failed == nil && bootrule.Check(wider.Log, more, bootrule.SignedBoot) == nil {
			r, kept, err = wider, more, nil
		}
	}
	if err != nil {
		return tpm.BootState{}, seal.Errorf(seal.CauseBootState, "name fewer PCRs in --weaken, switch Secure Boot on, or rely on the recovery identity",
			"the keyring would open for every system that is booted: %w", err)
	}
	s, err := r.state(kept, tpm.UseSuspend)
	s.Record = nil
	return s, err
}

// Signable returns the part of the present boot state that a slot for signed boot
// states keeps: Secure Boot is on, and its keys, shim's included, are those in force
// now.
func (g *Gate) Signable(ctx context.Context) (tpm.BootState, error) {
	r, pcrs, err := g.present(ctx)
	if err != nil {
		return tpm.BootState{}, err
	}
	keep := []int{secureBootPCR}
	if r.Log.BootType() == eventlog.BootGRUB {
		keep = append(keep, 14)
	}
	kept := slices.DeleteFunc(slices.Clone(pcrs), func(i int) bool { return !slices.Contains(keep, i) })
	if err := bootrule.Check(r.Log, kept, bootrule.SignedBoot); err != nil {
		return tpm.BootState{}, seal.Errorf(seal.CauseBootState, "switch Secure Boot on, and name PCR 7 in tpm.pcrs",
			"any system could extend PCR 11 to a signed value: %w", err)
	}
	s, err := r.state(kept, tpm.UseSigned)
	s.Record = nil
	return s, err
}

// Holds refuses PCRs of the running boot that hold neither the boot nor Secure Boot's
// keys. It is for objects that must outlive updates, and does not ask the boot policy.
// use says what any boot could do with the object; without is the hint that says how to
// do without it.
func (g *Gate) Holds(ctx context.Context, use string, pcrs []int, without string) error {
	unjudged := Gate{Attester: g.Attester, Bank: g.Bank}
	r, err := unjudged.AttestPCRs(ctx, pcrs)
	if err != nil {
		return err
	}
	if err := bootrule.Check(r.Log, pcrs, bootrule.SignedBoot); err != nil {
		return seal.Errorf(seal.CauseBootState, "switch Secure Boot on, or "+without, "any boot could %s: %w", use, err)
	}
	return nil
}

// present attests the running boot by the PCRs to seal to. It refuses any phase of the
// boot but the one in which slots are made.
func (g *Gate) present(ctx context.Context) (*Result, []int, error) {
	pcrs, err := g.ChoosePCRs()
	if err != nil {
		return nil, nil, err
	}
	r, err := g.AttestPCRs(ctx, pcrs)
	if err != nil {
		return nil, nil, err
	}
	return r, pcrs, g.CheckPhase(r.Log)
}

// checkPCRs refuses PCRs that leave a part of the boot open, unless any signed boot is
// accepted.
func (g *Gate) checkPCRs(log *eventlog.Log, pcrs []int) error {
	b, demand := bootrule.Of(log, pcrs), bootrule.WholeBoot
	if g.AnySigned != nil {
		demand = bootrule.SignedBoot
	}
	if err := b.Check(demand); err != nil {
		return seal.Errorf(seal.CauseBootState, g.remedy(b), "this boot can't be sealed to: %w", err)
	}
	if len(b.Open) > 0 {
		g.AnySigned(b)
	}
	return nil
}

// remedy says what to do if PCRs leave something open.
func (g *Gate) remedy(b bootrule.Binding) string {
	var ways []string
	if b.Whole != nil {
		ways = append(ways, "leave tpm.pcrs out, which then is PCR "+list(b.Whole))
	} else {
		ways = append(ways, "start the machine by its firmware's boot manager, and a boot loader and a kernel that measure what they start")
	}
	if b.SecureBoot == eventlog.SecureBootOn && g.AnySigned == nil {
		ways = append(ways, "accept whatever its keys let start, with tpm.anySignedBoot: true")
	}
	return strings.Join(ways, ", or ") + "; see docs/boot-states.md"
}

// state returns the boot state of these PCRs. The boot policy may have demanded more
// PCRs.
func (r *Result) state(pcrs []int, use tpm.Use) (tpm.BootState, error) {
	record, err := record(r.Log.Summarize(r.Bank, pcrs))
	if err != nil {
		return tpm.BootState{}, err
	}
	return tpm.BootState{PCR: authpolicy.PCR{Bank: r.Bank, Values: r.only(pcrs)}, Use: use, Record: record}, nil
}

func list(pcrs []int) string {
	return strings.Trim(strings.ReplaceAll(fmt.Sprint(pcrs), " ", ", "), "[]")
}
