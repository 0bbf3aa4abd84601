package eventlog

import (
	"bytes"
	"slices"
	"strings"
)

// BootType is the way in which a machine boots Linux. It decides which PCRs
// hold the kernel, its command line and its initrd.
type BootType string

// The boot types.
const (
	// BootUKI: a unified kernel image with systemd-stub.
	BootUKI BootType = "uki"
	// BootGRUB: GRUB, with or without shim.
	BootGRUB BootType = "grub"
	// BootEFIStub: the kernel's own EFI stub, started by firmware or systemd-boot.
	BootEFIStub BootType = "efi-stub"
	// BootUnknown: none of the above left its measurements.
	BootUnknown BootType = "unknown"
)

// BootType tells how the machine booted. For GRUB and UKIs it believes only data
// whose hash is the digest; what the EFI stub measures can't be recomputed, but
// it is asked last. GRUB that started a UKI is GRUB.
func (l *Log) BootType() BootType {
	switch {
	case l.has(8, isGRUBCommand):
		return BootGRUB
	case l.hasSection(".linux"):
		return BootUKI
	case l.has(9, isLinuxStub):
		return BootEFIStub
	default:
		return BootUnknown
	}
}

// PCRs returns the PCRs that hold what decides a boot of this type, ascending;
// none for BootUnknown. PCR 4 is the boot loader or image, 7 the Secure Boot
// state and keys. PCRs 9 and 14 are added to those of a UKI and of GRUB only
// where they have events.
//
//   - uki: 4, 7 and 11 (the image's sections); 9 (the command line and initrd as the
//     kernel got them) as well, unless Secure Boot is on and the image brings its own
//     command line: only then does systemd-stub ignore any other.
//   - grub: 4, 7, 8 (commands, command line), 9 (files), 14 (shim's keys), and 11 if
//     GRUB started a UKI.
//   - efi-stub: 4, 7 and 9.
func (t BootType) PCRs(l *Log) []int {
	any := func(Event) bool { return true }
	switch t {
	case BootUKI:
		pcrs := []int{4, 7, 11}
		on, known := l.SecureBoot()
		if !(known && on && l.hasSection(".cmdline")) && l.has(9, any) {
			pcrs = []int{4, 7, 9, 11}
		}
		return pcrs
	case BootGRUB:
		pcrs := []int{4, 7, 8, 9}
		if l.hasSection(".linux") {
			pcrs = append(pcrs, 11)
		}
		if l.has(14, any) {
			pcrs = append(pcrs, 14)
		}
		return pcrs
	case BootEFIStub:
		return []int{4, 7, 9}
	default:
		return nil
	}
}

// has reports whether some event of a PCR is as is says.
func (l *Log) has(pcr int, is func(Event) bool) bool {
	return slices.ContainsFunc(l.Events, func(e Event) bool { return e.PCR == pcr && e.extends() && is(e) })
}

// hasSection reports whether systemd-stub measured that section of a UKI.
func (l *Log) hasSection(name string) bool {
	return l.has(11, func(e Event) bool { return e.Proves([]byte(name + "\x00")) })
}

// grubPrefixes open the data of GRUB's events; what follows is measured, without
// the final NUL.
var grubPrefixes = []string{"grub_cmd: ", "kernel_cmdline: ", "module_cmdline: "}

// splitGRUB splits the data of a GRUB event; prefix is "" for any other.
func splitGRUB(data []byte) (prefix string, text []byte) {
	for _, p := range grubPrefixes {
		if text, ok := bytes.CutPrefix(data, []byte(p)); ok {
			return p, bytes.TrimSuffix(text, []byte{0})
		}
	}
	return "", nil
}

func isGRUBCommand(e Event) bool {
	prefix, text := splitGRUB(e.UntrustedData)
	return prefix != "" && (e.Proves(text) || e.Proves(append(bytes.Clone(text), 0)))
}

func isLinuxStub(e Event) bool {
	id, _, ok := parseTagged(e.UntrustedData)
	return ok && (id == tagLinuxInitrd || id == tagLinuxLoadOptions) ||
		strings.HasPrefix(string(e.UntrustedData), "LOADED_IMAGE::LoadOptions")
}
