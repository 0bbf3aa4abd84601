package bootpolicy

import (
	"fmt"
	"slices"
	"strings"
)

// Change is one way in which two boot policies differ.
type Change struct {
	// Path is the path of the rule: pcrs.4.sequences[0][2], counted in the first boot
	// policy, or in the second if the first has no such element.
	Path string `json:"path"`
	// Was and Now are the values in the first and the second boot policy; "" for none.
	Was string `json:"was,omitempty"`
	Now string `json:"now,omitempty"`
}

// String returns a line such as
//
//	pcrs.4.sequences[0][2]: was 1783b7756354… (image: \EFI\BOOT\BOOTX64.EFI, 10 bytes), now …
func (c Change) String() string {
	switch {
	case c.Was == "":
		return c.Path + ": new: " + c.Now
	case c.Now == "":
		return c.Path + ": gone: was " + c.Was
	}
	return c.Path + ": was " + c.Was + ", now " + c.Now
}

// Diff returns the demands of b that differ from those of a, or nothing if the two are
// equal. It shows notes and does not compare them.
func Diff(a, b *BootPolicy) []Change {
	d := &changes{}
	d.value("bank", a.Bank, b.Bank)
	d.value("secureBoot", string(a.SecureBoot), string(b.SecureBoot))
	d.value("firmware.startupLocality", number(a.Firmware.StartupLocality), number(b.Firmware.StartupLocality))
	d.versions(a.Firmware.Versions, b.Firmware.Versions)
	for pcr := range maxPCR + 1 {
		path := fmt.Sprintf("pcrs.%d", pcr)
		was, inA := a.PCRs[pcr]
		now, inB := b.PCRs[pcr]
		switch {
		case inA && inB:
			d.rule(path, pcr, was, now)
		case inA:
			d.value(path, summary(was), "")
		case inB:
			d.value(path, "", summary(now))
		}
	}
	return *d
}

type changes []Change

func (d *changes) value(path, was, now string) {
	if was != now {
		*d = append(*d, Change{path, printable(was, 2*maxNote), printable(now, 2*maxNote)})
	}
}

func number(n *int) string {
	if n == nil {
		return ""
	}
	return fmt.Sprint(*n)
}

// kind names the form of a rule: any, allowed or sequences.
func (r Rule) kind() string {
	switch {
	case r.Any:
		return "any"
	case r.Allowed != nil:
		return "allowed"
	}
	return "sequences"
}

// summary says what kind of rule stands in a policy, and how many entries it has.
func summary(r Rule) string {
	n := len(r.Allowed)
	for _, list := range r.Sequences {
		n += len(list)
	}
	return r.kind() + ", " + entries(n)
}

// versions compares sets.
func (d *changes) versions(was, now []string) {
	for i, v := range was {
		if !slices.Contains(now, v) {
			d.value(fmt.Sprintf("firmware.versions[%d]", i), fmt.Sprintf("%q", v), "")
		}
	}
	for i, v := range now {
		if !slices.Contains(was, v) {
			d.value(fmt.Sprintf("firmware.versions[%d]", i), "", fmt.Sprintf("%q", v))
		}
	}
}

func (d *changes) rule(path string, pcr int, was, now Rule) {
	d.value(path+".separator", fmt.Sprint(was.wantsSeparator(pcr)), fmt.Sprint(now.wantsSeparator(pcr)))
	if was.kind() != now.kind() {
		d.value(path, summary(was), summary(now))
		return
	}
	d.set(path+".allowed", was.Allowed, now.Allowed)
	d.sequences(path+".sequences", was.Sequences, now.Sequences)
}

// set compares two lists regardless of their order.
func (d *changes) set(path string, was, now []Entry) {
	only := func(in, out []Entry, add func(path, entry string)) {
		known := map[string]bool{}
		for _, e := range out {
			known[e.identity()] = true
		}
		for i, e := range in {
			if !known[e.identity()] {
				add(fmt.Sprintf("%s[%d]", path, i), e.String())
			}
		}
	}
	only(was, now, func(path, entry string) { d.value(path, entry, "") })
	only(now, was, func(path, entry string) { d.value(path, "", entry) })
}

// identity identifies an entry by its demand, without its note.
func (e Entry) identity() string { return string(e.Form) + " " + e.Value }

// sequences leaves out the lists that both have, and compares the others in their order.
func (d *changes) sequences(path string, was, now [][]Entry) {
	a, b := unmatched(was, now), unmatched(now, was)
	for i := range max(len(a), len(b)) {
		switch {
		case i >= len(b):
			d.value(fmt.Sprintf("%s[%d]", path, a[i]), listing(was[a[i]]), "")
		case i >= len(a):
			d.value(fmt.Sprintf("%s[%d]", path, b[i]), "", listing(now[b[i]]))
		default:
			d.sequence(fmt.Sprintf("%s[%d]", path, a[i]), was[a[i]], now[b[i]])
		}
	}
}

// unmatched returns the indices of the lists that others does not have.
func unmatched(lists, others [][]Entry) []int {
	known := map[string]bool{}
	for _, list := range others {
		known[identities(list)] = true
	}
	var out []int
	for i, list := range lists {
		if !known[identities(list)] {
			out = append(out, i)
		}
	}
	return out
}

func identities(list []Entry) string {
	s := make([]string, len(list))
	for i, e := range list {
		s[i] = fmt.Sprintf("%q", e.identity())
	}
	return strings.Join(s, "\n")
}

func listing(list []Entry) string { return "a list of " + entries(len(list)) }

func entries(n int) string {
	if n == 1 {
		return "1 entry"
	}
	return fmt.Sprintf("%d entries", n)
}

func (d *changes) sequence(path string, was, now []Entry) {
	for _, p := range differences(len(was), len(now), func(i, k int) bool { return was[i].identity() == now[k].identity() }) {
		var a, b string
		at := p.b
		if p.a >= 0 {
			a, at = was[p.a].String(), p.a
		}
		if p.b >= 0 {
			b = now[p.b].String()
		}
		d.value(fmt.Sprintf("%s[%d]", path, at), a, b)
	}
}
