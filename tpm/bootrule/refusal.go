package bootrule

import (
	"fmt"
	"slices"
	"strings"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// Refusal says which parts of a boot a set of PCRs leaves open.
type Refusal struct{ Binding Binding }

// Error returns a line such as
//
//	PCR 0, 11 leave open what boots: boot program (PCR 4 is left out); kernel, initrd and command line (any boot program can …); PCR 7, which shows Secure Boot, is left out
func (r *Refusal) Error() string {
	b := r.Binding
	s := fmt.Sprintf("PCR %s %s open what boots: ", list(b.PCRs), verb(b.PCRs))
	switch {
	case len(b.PCRs) == 0:
		s = "no PCR holds what boots: "
	case b.everything():
		s = "the event log does not show what boots: "
	}
	return s + strings.Join(b.reasons(), "; ")
}

// Decisive are the PCRs that decide a boot of any type.
func Decisive() []int { return []int{4, 7, 8, 9, 11, 12, 14} }

func (b Binding) everything() bool {
	return !slices.ContainsFunc(Decisive(), func(i int) bool { return !slices.Contains(b.PCRs, i) })
}

// reasons lists the open parts, grouped by reason, and the fault of Secure Boot.
func (b Binding) reasons() []string {
	var whys []string
	parts := map[string][]string{}
	for _, o := range b.Open {
		if parts[o.Why] == nil {
			whys = append(whys, o.Why)
		}
		parts[o.Why] = append(parts[o.Why], string(o.Part))
	}
	var reasons []string
	for _, why := range whys {
		reasons = append(reasons, and(parts[why])+" ("+why+")")
	}
	switch b.SecureBoot {
	case eventlog.SecureBootOn:
		return append(reasons, "whatever Secure Boot's keys let start would be let in")
	case "":
		return append(reasons, "PCR 7, which shows Secure Boot, is left out")
	}
	return append(reasons, "Secure Boot is "+string(b.SecureBoot))
}

// Describe says what a set of PCRs holds, for an operator who accepted less than the
// whole boot. It returns "" if the set holds the whole boot.
func (b Binding) Describe() string {
	if len(b.Open) == 0 {
		return ""
	}
	var parts []string
	for _, o := range b.Open {
		parts = append(parts, string(o.Part))
	}
	return "any " + and(parts) + " that Secure Boot's keys let start"
}

func leftOut(pcr int) string { return fmt.Sprintf("PCR %d is left out", pcr) }

func verb(pcrs []int) string {
	if len(pcrs) == 1 {
		return "leaves"
	}
	return "leave"
}

func list(pcrs []int) string {
	return strings.Trim(strings.ReplaceAll(fmt.Sprint(pcrs), " ", ", "), "[]")
}

// and joins words: a, b and c.
func and(words []string) string {
	if n := len(words) - 1; n > 0 {
		return strings.Join(words[:n], ", ") + " and " + words[n]
	}
	return strings.Join(words, "")
}
