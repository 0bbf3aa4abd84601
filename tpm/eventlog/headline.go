package eventlog

import (
	"slices"
	"strings"
)

// Headline sums up the differences of two boots in one sentence. was and now are the ways
// in which the machine booted, BootUnknown if that is not known.
func Headline(differences []Difference, was, now BootType) string {
	if was != now && was != BootUnknown && now != BootUnknown {
		return "the machine was booted " + byWhat[now] + " instead of " + byWhat[was]
	}
	state := secureBootNow(differences)
	changed := func(names ...string) bool {
		return slices.ContainsFunc(differences, func(d Difference) bool {
			if state != "" && (d.PCR == 7 || d.PCR == 4 && (d.Was == "" || d.Now == "")) {
				return false // it follows from the switch: the kernel is started in another way, and keys are gone
			}
			return slices.ContainsFunc(names, func(name string) bool { return d.Event == name || strings.HasPrefix(d.Event, name+" (") })
		})
	}
	var with []string
	for _, what := range headlines {
		if changed(what.events...) {
			with = append(with, what.words)
		}
	}
	switch {
	case state != "" && len(with) > 0:
		return "the machine booted with Secure Boot " + state + ", and with " + enumerate(with)
	case state != "":
		return "the machine booted with Secure Boot " + state
	case len(with) > 0:
		return "the machine booted with " + enumerate(with)
	case changed("unified kernel image"):
		return "the machine booted another unified kernel image"
	case len(differences) > 0 && !slices.ContainsFunc(differences, func(d Difference) bool { return !isPhase(d) }):
		return "the machine is in another phase of the boot than the slot is sealed to"
	}
	return "the machine did not boot as it did when the slot was sealed"
}

var byWhat = map[BootType]string{BootUKI: "as a UKI", BootGRUB: "by GRUB", BootEFIStub: "by the kernel's EFI stub"}

// headlines are the events by which a person would describe a boot, the most important ones
// first. Their consequences, such as the image of a UKI, are left to the details.
var headlines = []struct {
	words  string
	events []string
}{
	{"another kernel", []string{kernelImage}},
	{"another command line", []string{kernelCmdline}},
	{"another initrd", []string{"initrd"}},
	{"another boot loader", []string{"boot loader", bootProgram}},
	{"other keys of Secure Boot", []string{"Secure Boot platform key (PK)", "Secure Boot key exchange keys (KEK)", "Secure Boot allowed signers (db)"}},
	{"another list of revoked boot programs", []string{"list of revoked boot programs (dbx)", sbat}},
	{"other firmware", []string{"firmware", "firmware version"}},
}

// secureBootNow is "on" or "off" if Secure Boot was switched, else "".
func secureBootNow(differences []Difference) string {
	for _, d := range differences {
		if d.Event == secureBoot && (d.Now == "on" || d.Now == "off") {
			return d.Now
		}
	}
	return ""
}

func enumerate(words []string) string {
	if len(words) < 2 {
		return strings.Join(words, "")
	}
	return strings.Join(words[:len(words)-1], ", ") + " and " + words[len(words)-1]
}

// BootTypeOf returns how a recorded boot went, as [Log.BootType] does; BootUnknown if the
// record does not hold the PCR that shows it.
func BootTypeOf(recorded []Summary) BootType {
	has := func(pcr int, kind string) bool {
		return slices.ContainsFunc(recorded, func(s Summary) bool { return s.PCR == pcr && s.kind() == kind })
	}
	switch {
	case has(8, subjectGRUB):
		return BootGRUB
	case isUKI(recorded):
		return BootUKI
	case has(9, subjectLoadOptions):
		return BootEFIStub
	}
	return BootUnknown
}
