package eventlog

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
)

// Limits on the input and the output of Compare, per PCR. Nobody reads more than the
// first few lines, and later causes are usually the same.
const (
	maxCompared    = 512
	maxDifferences = 6
)

// String returns a line such as
//
//	PCR 8: kernel command line changed: was "/vmlinuz a", now "/vmlinuz b" (usually the command line was edited)
func (d Difference) String() string {
	var s string
	switch {
	case d.Was == "" && d.Now == "":
		s = d.Event
	case d.Was == "":
		s = d.Event + " is new: " + d.Now
	case d.Now == "":
		s = d.Event + " is gone: was " + d.Was
	default:
		s = d.Event + " changed: was " + d.Was + ", now " + d.Now
	}
	if d.Cause != "" {
		s += " (usually " + d.Cause + ")"
	}
	return fmt.Sprintf("PCR %d: %s", d.PCR, s)
}

// Compare returns, for every PCR that differs, the events that changed since the slot
// was made. was and wasPCR come from the slot's record, now and nowPCR from this boot.
// If wasPCR or nowPCR lacks a PCR, Compare judges that PCR by its events. Differences
// are sorted by PCR, then by the order of the events.
func Compare(was, now []Summary, wasPCR, nowPCR PCRs) []Difference {
	var all []Difference
	ctx := circumstances{
		uki:        isUKI(was) || isUKI(now),
		secureBoot: secureBootWhat(was) != secureBootWhat(now),
		restart:    restartIn(phasesOf(now)),
	}
	for pcr := range NumPCRs {
		before, after := ofPCR(was, pcr), ofPCR(now, pcr)
		a, b := wasPCR[pcr], nowPCR[pcr]
		same := slices.EqualFunc(before, after, sameDigest)
		if a != nil && b != nil {
			if bytes.Equal(a, b) {
				continue
			}
			if same {
				all = append(all, unexplained(pcr, len(before), a, b))
				continue
			}
		}
		if !same {
			all = append(all, compareEvents(pcr, before, after, ctx)...)
		}
	}
	return all
}

// unexplained describes a PCR whose value differs although its events do not.
func unexplained(pcr, events int, was, now []byte) Difference {
	d := Difference{PCR: pcr, Event: "value", Was: short(fmt.Sprintf("%x", was)), Now: short(fmt.Sprintf("%x", now)),
		Cause: "something measured into it without leaving an event in the log"}
	if events == 0 {
		d.Cause = "no event of it was recorded"
	}
	return d
}

func ofPCR(summaries []Summary, pcr int) []Summary {
	var of []Summary
	for _, s := range summaries {
		if s.PCR == pcr {
			of = append(of, s)
		}
	}
	return of
}

func isUKI(summaries []Summary) bool {
	return slices.ContainsFunc(summaries, func(s Summary) bool { return s.PCR == 11 && s.What == subjectSectionName+" .linux" })
}

// secureBootWhat returns the record of the state of Secure Boot.
func secureBootWhat(summaries []Summary) string {
	for _, s := range summaries {
		if s.PCR == 7 && s.kind() == subjectSecureBoot {
			return s.What
		}
	}
	return ""
}

// sameDigest compares only the digests, because only they are proven.
func sameDigest(a, b Summary) bool { return a.Digest == b.Digest }

// phasesOf returns the phases of a boot, as [Log.Phases] does.
func phasesOf(summaries []Summary) []string {
	var found []string
	for _, s := range summaries {
		if kind, word := s.value(); s.PCR == 11 && kind == subjectSystemd && slices.Contains(phases, word) {
			found = append(found, word)
		}
	}
	return found
}

func (c change) either() *Summary {
	if c.now != nil {
		return c.now
	}
	return c.was
}

// compareEvents explains the events of one PCR.
func compareEvents(pcr int, was, now []Summary, ctx circumstances) []Difference {
	var found []Difference
	for _, c := range pair(diff(was, now)) {
		// A digest that moved past an unchanged one counts as removed and added.
		if c.was != nil && c.now != nil && sameDigest(*c.was, *c.now) {
			continue
		}
		if d := explain(c, ctx); !slices.Contains(found, d) {
			found = append(found, d)
		}
	}
	var differences []Difference
	if pcr == 11 && ctx.restart != NoRestart && slices.ContainsFunc(found, isPhase) {
		found = slices.DeleteFunc(found, isPhase)
		differences = append(differences, Difference{PCR: pcr, Event: ctx.restart.String()})
	}
	for _, d := range found {
		if !isEcho(d, found) {
			differences = append(differences, d)
		}
	}
	if len(differences) == 0 { // only their order changed
		differences = []Difference{{PCR: pcr, Event: "the same events came in another order"}}
	}
	if n := len(differences) - maxDifferences; n > 0 {
		more := plural(n, "more event differs", "more events differ")
		differences = append(differences[:maxDifferences], Difference{PCR: pcr, Event: more})
	}
	return differences
}

// IsRestart reports whether the difference means that systemd started again.
func (d Difference) IsRestart() bool {
	return slices.ContainsFunc([]Restart{SoftReboot, Kexec}, func(r Restart) bool { return d.Event == r.String() })
}

func isPhase(d Difference) bool { return d.Event == bootPhase }

// diff returns the removed and the added events, by a longest common subsequence of the
// events between a common head and a common tail.
func diff(was, now []Summary) (removed, added []Summary) {
	for len(was) > 0 && len(now) > 0 && sameDigest(was[0], now[0]) {
		was, now = was[1:], now[1:]
	}
	for len(was) > 0 && len(now) > 0 && sameDigest(was[len(was)-1], now[len(now)-1]) {
		was, now = was[:len(was)-1], now[:len(now)-1]
	}
	was, now = was[:min(len(was), maxCompared)], now[:min(len(now), maxCompared)]
	length := make([][]int, len(was)+1) // of the longest common subsequence of the tails
	for i := range length {
		length[i] = make([]int, len(now)+1)
	}
	for i := len(was) - 1; i >= 0; i-- {
		for j := len(now) - 1; j >= 0; j-- {
			length[i][j] = max(length[i+1][j], length[i][j+1])
			if sameDigest(was[i], now[j]) {
				length[i][j] = length[i+1][j+1] + 1
			}
		}
	}
	i, j := 0, 0
	for i < len(was) || j < len(now) {
		switch {
		case i < len(was) && j < len(now) && sameDigest(was[i], now[j]):
			i, j = i+1, j+1
		case j == len(now) || i < len(was) && length[i+1][j] >= length[i][j+1]:
			removed = append(removed, was[i])
			i++
		default:
			added = append(added, now[j])
			j++
		}
	}
	return removed, added
}

// pair matches removed events with added events: first the same event that only moved,
// then events of one subject, then events of one kind.
func pair(removed, added []Summary) []change {
	changes := make([]change, len(removed))
	taken := make([]bool, len(added))
	for i := range removed {
		changes[i].was = &removed[i]
	}
	for _, alike := range []func(a, b Summary) bool{
		sameDigest,
		func(a, b Summary) bool { return a.Type == b.Type && a.subject() == b.subject() },
		func(a, b Summary) bool { return a.Type == b.Type && a.kind() == b.kind() },
	} {
		for i := range changes {
			if changes[i].now != nil {
				continue
			}
			for j := range added {
				if !taken[j] && alike(removed[i], added[j]) {
					changes[i].now, taken[j] = &added[j], true
					break
				}
			}
		}
	}
	for j := range added {
		if !taken[j] {
			changes = append(changes, change{now: &added[j]})
		}
	}
	return changes
}

// value splits What. An event has a value if its digest proves that value.
func (s Summary) value() (kind, value string) {
	kind, value, _ = strings.Cut(s.What, ": ")
	return kind, value
}

func (s Summary) kind() string {
	kind, _ := s.value()
	return kind
}

// subject returns the part of an event that is the same in two boots: the first word of
// a GRUB command, or the name of a file or an image without its version.
func (s Summary) subject() string {
	kind, value := s.value()
	switch kind {
	case subjectGRUB, subjectSystemd:
		value, _, _ = strings.Cut(value, " ")
	case subjectImage, subjectDriver:
		value, _, _ = strings.Cut(value, ", ")
		value = unversioned(value)
	case subjectFile:
		value = unversioned(value)
	case subjectShim: // the name of one of its lists
	default:
		value = ""
	}
	return kind + ": " + value
}

// unversioned leaves out digits: vmlinuz-6.1.0-9 and vmlinuz-6.1.0-10 are one subject.
func unversioned(name string) string {
	return strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' {
			return -1
		}
		return r
	}, name)
}
