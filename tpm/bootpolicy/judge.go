package bootpolicy

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// judgement is a log being judged.
type judgement struct {
	*Verdict
	policy *BootPolicy
	log    *eventlog.Log // of the judged bank alone
	events map[int][]event
	unit   []eventlog.Summary // see change
}

// Judge compares a boot with a boot policy. It checks, in this order:
//
//  1. The boot policy is valid, and the log has its bank.
//  2. quoted has exactly the demanded PCRs.
//  3. The log replays to every quoted value; a PCR that was extended has events.
//     The later steps look only at the digests of the demanded PCRs in that bank, and
//     at their order: these are proven now.
//  4. PCR 0 starts from the demanded locality, and before its separator comes an
//     allowed version.
//  5. PCR 7 shows the demanded state of Secure Boot; it is on only where a key of db
//     verified something.
//  6. By PCR: exactly one separator, where one is demanded, and none that reports
//     an error; every event matches its entry.
//
// It stops after step 1, 2 or 3 if that step fails. The caller must know that quoted is
// fresh and came from the right TPM. The time is proportional to the size of the log and
// of the boot policy.
func Judge(p *BootPolicy, log *eventlog.Log, quoted eventlog.PCRs) *Verdict {
	j := &judgement{Verdict: &Verdict{}, policy: p, events: map[int][]event{}}
	if !j.sound(log) || !j.exact(quoted) || !j.replays(log, quoted) {
		return j.Verdict
	}
	j.collect(log)
	j.judgeFirmware()
	j.judgeSecureBoot()
	for _, pcr := range p.Demanded() {
		j.judgeSeparator(pcr)
		j.judgeEvents(pcr)
	}
	j.Accepted = len(j.Findings) == 0
	return j.Verdict
}

func (j *judgement) sound(log *eventlog.Log) bool {
	switch err := j.policy.Validate(); {
	case err != nil:
		j.add(Finding{Rule: "file", PCR: NoEvent, Event: NoEvent, Problem: err.Error(), Next: nextEdit})
	case !slices.Contains(log.Banks, j.policy.Hash()):
		j.add(Finding{Rule: "bank", PCR: NoEvent, Event: NoEvent, Problem: "the log does not have this bank", Want: j.policy.Bank, Got: bankNames(log),
			Next: "switch that bank of the TPM on in the firmware's setup, or record a boot policy of another bank"})
	}
	return len(j.Findings) == 0
}

func bankNames(log *eventlog.Log) string {
	var names []string
	for _, b := range log.Banks {
		names = append(names, eventlog.BankName(b))
	}
	return fmt.Sprint(names)
}

func (j *judgement) exact(quoted eventlog.PCRs) bool {
	for _, pcr := range j.policy.Demanded() {
		if value, ok := quoted[pcr]; !ok || len(value) != j.policy.Hash().Size() {
			j.add(Finding{Rule: fmt.Sprintf("pcrs.%d", pcr), PCR: pcr, Event: NoEvent,
				Problem: "the PCR was not quoted in this bank", Next: nextQuote})
		}
	}
	for _, pcr := range slices.Sorted(maps.Keys(quoted)) {
		if _, ok := j.policy.PCRs[pcr]; !ok {
			j.add(Finding{Rule: "pcrs", PCR: pcr, Event: NoEvent,
				Problem: fmt.Sprintf("PCR %d was quoted, and has no rule", pcr), Next: nextQuote})
		}
	}
	return len(j.Findings) == 0
}

func (j *judgement) replays(log *eventlog.Log, quoted eventlog.PCRs) bool {
	err := log.Verify(j.policy.Hash(), quoted)
	var mismatch *eventlog.MismatchError
	switch {
	case err == nil:
		return true
	case !errors.As(err, &mismatch):
		j.add(Finding{Rule: "bank", PCR: NoEvent, Event: NoEvent, Problem: err.Error(), Next: nextForged})
		return false
	}
	for _, pcr := range mismatch.PCRs {
		problem := "the events do not lead to the quoted value"
		if slices.Contains(mismatch.Silent, pcr) {
			problem = "it was extended, and the log has no event of it"
		}
		j.add(Finding{Rule: fmt.Sprintf("pcrs.%d", pcr), PCR: pcr, Event: NoEvent, Problem: problem,
			Got: short(fmt.Sprintf("%x", quoted[pcr])), Next: nextForged})
	}
	return false
}

// collect takes the events that extended the demanded PCRs out of the log, in one bank,
// because digests of other banks were not quoted.
func (j *judgement) collect(log *eventlog.Log) {
	bank, demanded := j.policy.Hash(), j.policy.Demanded()
	j.log = log.Only(bank)
	for i, e := range j.log.Events {
		if e.UntrustedType == eventlog.NoAction || !slices.Contains(demanded, e.PCR) {
			continue
		}
		digest := e.Digest(bank)
		j.events[e.PCR] = append(j.events[e.PCR], event{e, i, digest, proven(e, digest)})
	}
	j.unit = j.log.Summarize(bank, []int{11})
	j.unit = j.unit[:min(len(j.unit), 32)]
}

func (j *judgement) judgeFirmware() {
	f := j.policy.Firmware
	if f.StartupLocality != nil {
		// The replay has shown that PCR 0 began with the locality that the log claims.
		if locality, err := j.log.StartupLocality(); err != nil || int(locality) != *f.StartupLocality {
			j.add(Finding{Rule: "firmware.startupLocality", PCR: 0, Event: NoEvent, Problem: "the TPM was started from another locality",
				Want: fmt.Sprint(*f.StartupLocality), Got: fmt.Sprint(locality), Cause: "a firmware update, or a TPM that was reset after the start",
				Next: "switch the machine off and on again; if the locality stays and you updated the firmware, edit firmware.startupLocality"})
		}
	}
	if len(f.Versions) == 0 {
		return
	}
	allowed := map[key]bool{}
	for _, v := range f.Versions {
		for _, k := range (Entry{Form: FormText, Value: v}).keys(j.policy.Hash()) {
			allowed[k] = true
		}
	}
	found := false
	for _, e := range j.events[0] {
		switch ok := slices.ContainsFunc(e.keys, func(k key) bool { return allowed[k] }); {
		case separatorOf(e.Event) != noSeparator:
			j.missingVersion(found)
			return
		case ok:
			found = true
		case e.UntrustedType == eventlog.CRTMVersion:
			j.add(Finding{Rule: "firmware.versions", PCR: 0, Event: e.index, Problem: "this version of the firmware is not allowed",
				Want: fmt.Sprintf("one of %q", f.Versions[:min(len(f.Versions), 8)]), Got: e.what(), Cause: "a firmware update", Next: nextUpdate})
			found = true
		}
	}
	j.missingVersion(found)
}

func (j *judgement) missingVersion(found bool) {
	if v := j.policy.Firmware.Versions; !found {
		j.add(Finding{Rule: "firmware.versions", PCR: 0, Event: NoEvent, Problem: "the firmware measured none of the allowed versions before its separator",
			Want: fmt.Sprintf("one of %q", v[:min(len(v), 8)]), Cause: "a firmware update", Next: nextUpdate})
	}
}

func (j *judgement) judgeSecureBoot() {
	if j.policy.SecureBoot == "" {
		return
	}
	state := j.log.SecureBootState()
	f := Finding{Rule: "secureBoot", PCR: 7, Event: NoEvent, Want: string(j.policy.SecureBoot), Got: string(state)}
	switch got := recordedAs(state); {
	case state == eventlog.SecureBootIdle:
		f.Problem, f.Cause, f.Next = "Secure Boot is on, and PCR 7 shows no key that verified what was started", "a hypervisor that starts the kernel itself", nextBoot
	case got == "":
		f.Problem, f.Next = "PCR 7 does not prove the state of Secure Boot", nextForged
	case got != j.policy.SecureBoot:
		f.Got, f.Problem, f.Cause, f.Next = string(got), "Secure Boot is in another state", "it was switched in the firmware's setup", nextSetup
	default:
		return
	}
	j.add(f)
}

// recordedAs returns the value of secureBoot for a state; "" for a state that proves
// nothing.
func recordedAs(state eventlog.SecureBootState) SecureBoot {
	switch state {
	case eventlog.SecureBootOn:
		return SecureBootEnabled
	case eventlog.SecureBootOff:
		return SecureBootDisabled
	}
	return ""
}

func (j *judgement) judgeSeparator(pcr int) {
	if !j.policy.PCRs[pcr].wantsSeparator(pcr) {
		return
	}
	f := Finding{Rule: fmt.Sprintf("pcrs.%d.separator", pcr), PCR: pcr, Event: NoEvent, Want: "exactly one", Next: nextForged}
	n := 0
	for _, e := range j.events[pcr] {
		s := separatorOf(e.Event)
		if s != noSeparator {
			n++
		}
		if s == goodSeparator || s == noSeparator && e.UntrustedType != eventlog.Separator || j.full() {
			continue
		}
		at := f
		at.Event, at.Got = e.index, e.what()
		at.Problem = "an event claims to be a separator, and its digest is another"
		if s == errorSeparator {
			at.Problem, at.Next = "the firmware reports that it could not measure", "look for an error in the firmware's setup, and update the firmware"
		}
		j.add(at)
	}
	if n != 1 {
		f.Problem, f.Got = "the firmware's measurements do not end once", fmt.Sprint(n)
		j.add(f)
	}
}
