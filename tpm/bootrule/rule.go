package bootrule

import (
	"fmt"
	"slices"
	"strings"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// Part is a part of a boot that decides what runs.
type Part string

// The parts, in the order in which they run.
const (
	Program     Part = "boot program"
	Kernel      Part = "kernel"
	Initrd      Part = "initrd"
	CommandLine Part = "command line"
)

// Demand is what a set of PCRs must hold.
type Demand int

const (
	// WholeBoot demands every part of the boot.
	WholeBoot Demand = iota
	// SignedBoot accepts less if PCR 7 is in the set and proves that Secure Boot is on:
	// the set then allows every boot that Secure Boot's keys allow, and no other.
	SignedBoot
)

// Open is a part that a set of PCRs does not hold, with the reason.
type Open struct {
	Part Part
	Why  string
}

// Binding says which parts of a boot a set of PCRs holds.
type Binding struct {
	PCRs []int
	// Boot is how the machine booted, as far as these PCRs show it.
	Boot eventlog.BootType
	// Open are the parts that the set leaves open, in the order of the parts.
	Open []Open
	// SecureBoot is the state of Secure Boot, or "" if PCR 7 is not in the set.
	SecureBoot eventlog.SecureBootState
	// Whole is the set that holds every part of this boot, or nil if there is no such
	// set.
	Whole []int
}

// Check refuses a set of PCRs that does not hold what d demands of this boot. A refusal
// is a [*Refusal].
func Check(log *eventlog.Log, pcrs []int, d Demand) error { return Of(log, pcrs).Check(d) }

// Check refuses a binding that does not hold what d demands, with a [*Refusal].
func (b Binding) Check(d Demand) error {
	if len(b.Open) == 0 || d == SignedBoot && b.SecureBoot == eventlog.SecureBootOn {
		return nil
	}
	return &Refusal{b}
}

// Possible refuses a set of PCRs that can't hold what d demands on any machine. It
// checks a configuration before there is a log.
func Possible(pcrs []int, d Demand) error {
	switch {
	case slices.Contains(pcrs, 4), d == SignedBoot && slices.Contains(pcrs, 7):
		return nil
	case d == SignedBoot:
		return fmt.Errorf("PCR %s holds neither the boot program (PCR 4) nor Secure Boot's keys (PCR 7), so that any boot could extend the rest to the same values", list(pcrs))
	case slices.Contains(pcrs, 7):
		return fmt.Errorf("PCR %s holds no boot program, which is PCR 4: whatever Secure Boot's keys let start would be let in", list(pcrs))
	}
	return fmt.Errorf("PCR %s holds no boot program, which is PCR 4, so that any boot could extend the rest to the same values", list(pcrs))
}

// Of returns what a set of PCRs holds of the boot of this log.
func Of(log *eventlog.Log, pcrs []int) Binding {
	b := hold(log, pcrs)
	whole := log.BootType().PCRs(log)
	if len(whole) > 0 && len(hold(log, whole).Open) == 0 {
		b.Whole = whole
	}
	return b
}

// holding is a Binding under construction.
type holding struct {
	Binding
	shown eventlog.Measured // by the PCRs of the set
	whole eventlog.BootType // of the whole log, only for words
}

func hold(log *eventlog.Log, pcrs []int) Binding {
	view := &eventlog.Log{Banks: log.Banks}
	for _, e := range log.Events {
		if slices.Contains(pcrs, e.PCR) {
			view.Events = append(view.Events, e)
		}
	}
	h := &holding{shown: view.Measured(), whole: log.BootType()}
	h.PCRs, h.Boot = slices.Sorted(slices.Values(pcrs)), view.BootType()
	if h.has(7) {
		h.SecureBoot = view.SecureBootState()
	}
	h.program()
	switch h.Boot {
	case eventlog.BootUKI:
		h.uki()
	case eventlog.BootGRUB:
		h.grub()
	case eventlog.BootEFIStub: // the kernel is the image, and measures initrd and command line itself
	default:
		h.unknown()
	}
	if h.is(Program) { // then everything else is open too
		for _, p := range []Part{Kernel, Initrd, CommandLine} {
			h.open(p, "any boot program can extend PCR 8 to 15 to the same values")
		}
	}
	return h.Binding
}

func (h *holding) has(pcr int) bool { return slices.Contains(h.PCRs, pcr) }

func (h *holding) is(open Part) bool {
	return slices.ContainsFunc(h.Open, func(o Open) bool { return o.Part == open })
}

// open adds an open part, once.
func (h *holding) open(p Part, why string) {
	if !h.is(p) {
		h.Open = append(h.Open, Open{p, why})
	}
}

// left says why a PCR does not help: the set leaves it out, or its events are not
// enough.
func (h *holding) left(pcr int, otherwise string) string {
	if !h.has(pcr) {
		return leftOut(pcr)
	}
	return otherwise
}

func (h *holding) program() {
	if !h.shown.Image {
		h.open(Program, h.left(4, "PCR 4 has no image, only actions and separators"))
	}
}

// uki: PCRs 4 and 11 hold the image. systemd-stub accepts another command line from
// outside unless Secure Boot is on and the image has its own. The kernel measures an
// initrd from outside the image, if the kernel measures at all.
func (h *holding) uki() {
	m := h.shown
	if !m.InitrdSection && !m.Initrd && !m.LoadOptions {
		h.open(Initrd, h.left(9, "the image has none, and the kernel measured none into PCR 9"))
	}
	h.ukiCommandLine()
}

func (h *holding) ukiCommandLine() {
	m := h.shown
	if m.LoadOptions || m.ExtraCommandLine || m.CommandLineSection && h.SecureBoot == eventlog.SecureBootOn {
		return
	}
	why := "the image has none"
	if m.CommandLineSection {
		why = "systemd-stub takes another one unless Secure Boot is on"
	}
	h.open(CommandLine, why+", and "+h.left(9, "PCR 9 has none"))
}

func (h *holding) grub() {
	m := h.shown
	if !m.File {
		why := h.left(9, "GRUB measured no file into PCR 9")
		h.open(Kernel, why)
		h.open(Initrd, why)
	}
	switch {
	case m.CommandLine || m.LoadOptions:
	case m.LinuxSection: // GRUB started a UKI
		h.ukiCommandLine()
	default:
		h.open(CommandLine, "GRUB measured none into PCR 8")
	}
}

// unknown: the PCRs of the set show none of the known ways to boot. If the whole log
// does, the set leaves out the PCRs that would.
func (h *holding) unknown() {
	why := "no unified kernel image in PCR 11, no GRUB in PCR 8, and no EFI stub in PCR 9 shows it"
	switch h.whole {
	case eventlog.BootUKI:
		why = leftOut(11)
	case eventlog.BootGRUB:
		why = leftOut(8)
	case eventlog.BootEFIStub:
		why = leftOut(9)
	}
	h.open(Kernel, why)
	if !h.shown.Initrd {
		h.open(Initrd, why)
	}
	h.open(CommandLine, why)
}

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

func verb(pcrs []int) string {
	if len(pcrs) == 1 {
		return "leaves"
	}
	return "leave"
}

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

// Decisive are the PCRs that decide a boot of any type.
func Decisive() []int { return []int{4, 7, 8, 9, 11, 12, 14} }
