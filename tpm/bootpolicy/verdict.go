package bootpolicy

import (
	"fmt"
	"slices"
	"strings"
)

// maxFindings bounds a verdict. Nobody reads more, and a log may have 65,536 events.
const maxFindings = 48

// NoEvent is the index of a finding that is not about one event.
const NoEvent = -1

// Verdict is the result of judging a log.
type Verdict struct {
	// Accepted is true only if every rule held.
	Accepted bool `json:"accepted"`
	// Findings are the rules that did not hold, in the order of Judge's steps, then by PCR.
	Findings []Finding `json:"findings,omitempty"`
	// More counts further findings, which are left out.
	More int `json:"more,omitempty"`
}

// Finding is one rule that does not hold.
type Finding struct {
	// Rule is the path of the rule in the boot policy: pcrs.4.sequences[0][2].
	Rule string `json:"rule"`
	// PCR is NoEvent (-1) if the rule is not about one PCR.
	PCR int `json:"pcr"`
	// Event is the event's index in the log, from 0, or NoEvent.
	Event int `json:"event"`
	// Problem says what is wrong: "kernel command line changed".
	Problem string `json:"problem"`
	// Want and Got are the expected and the actual value; "" for none.
	Want string `json:"want,omitempty"`
	Got  string `json:"got,omitempty"`
	// Cause is the usual cause, or "".
	Cause string `json:"cause,omitempty"`
	// Next says what to do.
	Next string `json:"next"`
}

// String returns a line such as
//
//	pcrs.8.sequences[0][6]: kernel command line changed: want "/vmlinuz a", got "/vmlinuz b" (usually the command line was edited); if …
func (f Finding) String() string { return f.finding() + "; " + f.Next }

// finding is the line without what to do.
func (f Finding) finding() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s", f.Rule, f.Problem)
	sep := ": "
	for _, v := range []struct{ word, value string }{{"want", f.Want}, {"got", f.Got}} {
		if v.value != "" {
			b.WriteString(sep + v.word + " " + v.value)
			sep = ", "
		}
	}
	if f.Cause != "" {
		b.WriteString(" (usually " + f.Cause + ")")
	}
	return b.String()
}

// Err returns nil for an accepted boot, and a [*RefusedError] otherwise.
func (v *Verdict) Err() error {
	if v.Accepted {
		return nil
	}
	return &RefusedError{v}
}

// RefusedError says that the boot policy refuses a boot. Its text is the headline and the
// details in one line, without what to do.
type RefusedError struct{ Verdict *Verdict }

// maxDetails bounds the findings in an error. Nobody reads more of a refusal.
const maxDetails = 6

// Error implements error.
func (e *RefusedError) Error() string {
	if details := e.Details(); len(details) > 0 {
		return e.Headline() + ": " + strings.Join(details, "; ")
	}
	return e.Headline()
}

// Headline says what happened in one sentence.
func (e *RefusedError) Headline() string {
	if len(e.Verdict.Findings) == 0 {
		return "the boot policy was not judged"
	}
	return "the boot policy refuses this boot"
}

// Details are the first findings, one a line.
func (e *RefusedError) Details() []string {
	var details []string
	for _, f := range e.Verdict.Findings[:min(len(e.Verdict.Findings), maxDetails)] {
		details = append(details, f.finding())
	}
	if n := e.Left(); n > 0 {
		details = append(details, fmt.Sprintf("and %d more", n))
	}
	return details
}

// Left is how many findings the details leave out.
func (e *RefusedError) Left() int {
	return max(len(e.Verdict.Findings)-maxDetails, 0) + e.Verdict.More
}

// Hint says what to do about the first finding.
func (e *RefusedError) Hint() string {
	if len(e.Verdict.Findings) == 0 {
		return ""
	}
	return e.Verdict.Findings[0].Next
}

// full reports whether the verdict has no room for another finding, and counts it then.
func (v *Verdict) full() bool {
	if len(v.Findings) < maxFindings {
		return false
	}
	v.More++
	return true
}

func (v *Verdict) add(f Finding) {
	f.Want, f.Got = printable(f.Want, 2*maxNote), printable(f.Got, 2*maxNote)
	if !slices.Contains(v.Findings, f) && !v.full() {
		v.Findings = append(v.Findings, f)
	}
}

// Hints for the operator, by the kind of problem.
const (
	nextForged = "the log was tampered with, or something extended a PCR without logging it: judge fresh evidence, and if the problem stays find out what runs before kleidi"
	nextQuote  = "quote exactly the PCRs of the boot policy, in its bank"
	nextEdit   = "run kleidi bootpolicy show FILE to see every problem, and edit the boot policy"
	nextChange = "if you made this change, run kleidi bootpolicy record --file NEW on this boot, look at kleidi bootpolicy diff OLD NEW, and put NEW in its place; if you did not, boot a kernel that you know and find out who made the change"
	nextBoot   = "start the machine by its firmware's boot manager, from a disk, so that the firmware verifies what it starts"
	nextSetup  = "set Secure Boot as the boot policy says in the firmware's setup, or edit secureBoot"
	nextUpdate = "if this firmware is meant to run, add its version to firmware.versions; else put the earlier firmware back"
)
