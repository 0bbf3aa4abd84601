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
	// BootEFIStub: the kernel's own EFI stub, started by firmware or systemd-boot, in a
	// version that measures its command line.
	BootEFIStub BootType = "efi-stub"
	// BootUnknown: none of the above left its measurements.
	BootUnknown BootType = "unknown"
)

// Measured lists the parts of a boot that a log shows. A part counts only in its own
// PCR and before systemd's separator: later events belong to the operating system.
type Measured struct {
	// Image: PCR 4 has an image that the firmware started, for instance a boot loader.
	Image bool
	// Command and CommandLine: PCR 8 has a command that GRUB ran, and the command line
	// with which GRUB started the kernel.
	Command, CommandLine bool
	// File: PCR 9 has a file that GRUB read.
	File bool
	// LoadOptions and Initrd: PCR 9 has the command line and the initrd that Linux's
	// EFI stub found.
	LoadOptions, Initrd bool
	// LinuxSection, CommandLineSection and InitrdSection: PCR 11 has these sections of a
	// unified kernel image.
	LinuxSection, CommandLineSection, InitrdSection bool
	// ExtraCommandLine: PCR 12 has a command line that systemd-stub received from
	// outside.
	ExtraCommandLine bool
}

// Measured returns the measured parts of a boot. For GRUB and UKIs it believes data
// only if the hash of the data is the digest. The digest of an image or a file, and of
// what the EFI stub measures, can't be recomputed from the log. There Measured believes
// the log, unless the digest is that of something else.
func (l *Log) Measured() Measured {
	section := func(name string) func(Event) bool {
		return func(e Event) bool { return e.Proves([]byte(name + "\x00")) }
	}
	return Measured{
		Image:              l.hasBeforeOS(4, isImage),
		Command:            l.hasBeforeOS(8, isGRUBCommand),
		CommandLine:        l.hasBeforeOS(8, isKernelCommandLine),
		File:               l.hasBeforeOS(9, isGRUBFile),
		LoadOptions:        l.hasBeforeOS(9, isLoadOptions),
		Initrd:             l.hasBeforeOS(9, isInitrd),
		LinuxSection:       l.hasBeforeOS(11, section(".linux")),
		CommandLineSection: l.hasBeforeOS(11, section(".cmdline")),
		InitrdSection:      l.hasBeforeOS(11, section(".initrd")),
		ExtraCommandLine:   l.hasBeforeOS(12, isProvenText),
	}
}

// BootType returns how the machine booted. It considers the EFI stub last, because
// nothing proves what the stub measures. A UKI that GRUB started counts as GRUB.
func (l *Log) BootType() BootType {
	switch m := l.Measured(); {
	case m.Command:
		return BootGRUB
	case m.LinuxSection:
		return BootUKI
	case m.LoadOptions:
		return BootEFIStub
	default:
		return BootUnknown
	}
}

// PCRs returns the PCRs that hold everything that decides a boot of this type,
// ascending; none for BootUnknown. PCR 4 is the boot loader or image, 7 the Secure Boot
// state and keys. For UKIs and GRUB, PCRs 9, 12 and 14 are in the list only if they
// have events.
//
//   - uki: 4, 7 and 11 (the image's sections). Also 9 (the command line and initrd as the
//     kernel received them), unless Secure Boot is on and the image has its own command
//     line: only then does systemd-stub ignore any other command line. 9 is also added for
//     an image without an initrd. If the kernel does not measure its command line, 12 (the
//     command line that systemd-stub received) takes the place of 9.
//   - grub: 4, 7, 8 (commands, command line), 9 (files), 14 (shim's keys), and 11 if
//     GRUB started a UKI.
//   - efi-stub: 4, 7 and 9.
func (t BootType) PCRs(l *Log) []int {
	any := func(Event) bool { return true }
	m := l.Measured()
	switch t {
	case BootUKI:
		on, known := l.SecureBoot()
		own := known && on && m.CommandLineSection
		pcrs := []int{4, 7, 11}
		if (!own || !m.InitrdSection) && l.has(9, any) {
			pcrs = []int{4, 7, 9, 11}
		}
		if !own && !m.LoadOptions && m.ExtraCommandLine {
			pcrs = append(pcrs, 12)
		}
		return pcrs
	case BootGRUB:
		pcrs := []int{4, 7, 8, 9}
		if m.LinuxSection {
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

// has reports whether is holds for some event of a PCR.
func (l *Log) has(pcr int, is func(Event) bool) bool {
	return slices.ContainsFunc(l.Events, func(e Event) bool { return e.PCR == pcr && e.extends() && is(e) })
}

// hasBeforeOS is like has, for the events before systemd's separator. If there is no
// separator, any of the events may come from the operating system.
func (l *Log) hasBeforeOS(pcr int, is func(Event) bool) bool {
	for _, e := range l.Events {
		switch {
		case e.PCR != pcr || !e.extends():
		case e.mayBe([]byte(OSSeparator)):
			return false
		case is(e):
			return true
		}
	}
	return false
}

// grubPrefixes begin the data of GRUB's events. The rest of the data is measured,
// without the final NUL; RHEL 8's GRUB, which writes no colon, measures the NUL too.
var grubPrefixes = []string{"grub_cmd: ", "kernel_cmdline: ", "module_cmdline: ", "grub_cmd ", "grub_kernel_cmdline "}

// splitGRUB splits the data of a GRUB event; prefix is "" for any other event.
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

// isKernelCommandLine recognises the command line that GRUB gave the kernel.
func isKernelCommandLine(e Event) bool {
	prefix, _ := splitGRUB(e.UntrustedData)
	return strings.Contains(prefix, "kernel_cmdline") && isGRUBCommand(e)
}

// isGRUBFile recognises a file that GRUB read, by its name.
func isGRUBFile(e Event) bool {
	return e.UntrustedType == IPL && len(e.UntrustedData) > 0 && !isSomethingElse(e)
}

// isImage recognises the event of a started image. The digest is the image's own, so it
// must not be the digest of anything else that is measured into PCR 4.
func isImage(e Event) bool {
	if e.UntrustedType != EFIBootServicesApp {
		return false
	}
	i, err := parseImageLoad(e.UntrustedData)
	return err == nil && i.size > 0 && !isSomethingElse(e)
}

// actions are measured into PCR 4 as text, like images (TCG PFP 1.06, 10.4.4).
var actions = []string{
	"Calling EFI Application from Boot Option", "Returning from EFI Application from Boot Option",
	"Entering ROM Based Setup", "Exit Boot Services Invocation", "Exit Boot Services Returned with Failure", "Exit Boot Services Returned with Success",
}

// isSomethingElse reports whether an event that should have the digest of a file has
// the digest of its own data, of a separator or of an action. Then no file was
// measured.
func isSomethingElse(e Event) bool {
	return e.mayBe(e.UntrustedData) || e.mayBe(nil) || separatorKind(e) >= 0 ||
		slices.ContainsFunc(actions, func(a string) bool { return e.mayBe([]byte(a)) })
}

// isLoadOptions recognises the event of the command line that Linux's EFI stub
// measures. The event of the initrd alone does not prove a stub that measures both:
// older stubs measure only the initrd.
func isLoadOptions(e Event) bool {
	id, _, ok := parseTagged(e.UntrustedData)
	return (ok && id == tagLinuxLoadOptions || strings.HasPrefix(string(e.UntrustedData), "LOADED_IMAGE::LoadOptions")) && !isSomethingElse(e)
}

func isInitrd(e Event) bool {
	id, _, ok := parseTagged(e.UntrustedData)
	return ok && id == tagLinuxInitrd && !isSomethingElse(e)
}

// isProvenText recognises text in UTF-16 whose hash is the digest.
func isProvenText(e Event) bool { return isUTF16(e.UntrustedData) && e.Proves(e.UntrustedData) }

// isUTF16 recognises little-endian text that is mostly ASCII.
func isUTF16(b []byte) bool {
	if len(b) < 2 {
		return false
	}
	high := 0
	for i := 1; i < len(b); i += 2 {
		if b[i] == 0 {
			high++
		}
	}
	return b[0] != 0 && high > len(b)/4 // an odd last byte is dropped
}
