package eventlog

import (
	"cmp"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// A cause describes an event in words, and the usual reason for a change of it. It
// applies to events of one PCR (or any) whose What matches.
type cause struct {
	pcr   int // -1: any
	what  *regexp.Regexp
	event string
	cause string
}

const anyPCR = -1

const keysEnrolled = "keys enrolled, removed or reset in the firmware's setup, or a firmware update"

// Events that explain and isEcho know.
const (
	grubLinux     = "GRUB's kernel line"
	kernelCmdline = "kernel command line"
	sectionName   = "list of sections in the unified kernel image"
	secureBoot    = "Secure Boot"
	signer        = "key that signed the boot program"
	sbat          = "list of revoked boot loaders (SBAT)"
	kernelImage   = "kernel"
	bootProgram   = "boot program"
	bootPhase     = "boot phase"
)

// causes are searched from the top; the first one that applies decides.
var causes = []cause{
	{anyPCR, regexp.MustCompile(`^separator: the firmware`), "separator", "an error in the firmware, such as a failed measurement"},
	{anyPCR, regexp.MustCompile(`^separator`), "end of the firmware's measurements", ""},
	{anyPCR, regexp.MustCompile(`^systemd: os-separator$`), "systemd's separator", "a systemd update"},

	{0, regexp.MustCompile(`^firmware version`), "firmware version", "a firmware update"},
	{0, regexp.MustCompile(``), "firmware", "a firmware update, or other firmware settings"},
	{1, regexp.MustCompile(`^Boot(Order|[0-9A-F]{4})`), "boot menu", "a change of the boot order, or a new boot entry"},
	{1, regexp.MustCompile(``), "firmware settings", "a change in the firmware's setup or in the hardware"},
	{2, regexp.MustCompile(``), "driver of a device", "a device added, removed or updated"},
	{3, regexp.MustCompile(``), "settings of a device", "a device added, removed or reconfigured"},

	{4, regexp.MustCompile(`(?i)\b(shim|mm|fb|grub|systemd-boot|refind)[a-z0-9_-]*\.efi`), "boot loader", "a boot loader update"},
	{4, regexp.MustCompile(`(?i)(vmlinu|linux|kernel|loaded from memory)`), kernelImage, "a kernel update, or another kernel chosen in the boot menu"},
	{4, regexp.MustCompile(`(?i)\\EFI\\BOOT\\BOOT[A-Z0-9]+\.EFI`), bootProgram, "a boot loader update"},
	{4, regexp.MustCompile(`^image`), bootProgram, "a boot loader or kernel update, or another choice in the boot menu"},
	{4, regexp.MustCompile(`^action`), "firmware's boot step", "another choice in the boot menu, or a boot entry that failed first"},
	{5, regexp.MustCompile(`^partition table`), "partition table", "a change of the boot disk's partitions, or another boot disk"},
	{5, regexp.MustCompile(``), "boot loader settings", "a change of the boot loader's configuration"},

	{7, regexp.MustCompile(`^Secure Boot: `), secureBoot, "it was switched on or off in the firmware's setup"},
	{7, regexp.MustCompile(`^dbx: `), "list of revoked boot programs (dbx)", "a revocation update, by fwupd or with the firmware"},
	{7, regexp.MustCompile(`^PK: `), "Secure Boot platform key (PK)", keysEnrolled},
	{7, regexp.MustCompile(`^KEK: `), "Secure Boot key exchange keys (KEK)", keysEnrolled},
	{7, regexp.MustCompile(`^(db|dbt|dbr): `), "Secure Boot allowed signers (db)", keysEnrolled},
	{7, regexp.MustCompile(`^SBAT level`), sbat, "a shim update"},
	{7, regexp.MustCompile(`^authorised by`), signer, "a boot loader or kernel signed by somebody else"},
	{7, regexp.MustCompile(``), "Secure Boot settings", "a change in the firmware's setup, or a shim update"},

	{anyPCR, regexp.MustCompile(`^kernel_cmdline`), kernelCmdline, "the command line was edited, or a kernel update"},
	{8, regexp.MustCompile(`^grub_cmd: linux`), grubLinux, "the command line was edited, or a kernel update"},
	{8, regexp.MustCompile(`^grub_cmd: initrd`), "GRUB's initrd line", "a kernel update"},
	{8, regexp.MustCompile(`^grub_cmd`), "GRUB command", "GRUB's configuration was changed, or another choice in the boot menu"},
	{8, regexp.MustCompile(``), kernelCmdline, "the command line was edited"},

	{9, regexp.MustCompile(`^load options`), kernelCmdline, "the command line was edited, or a kernel update"},
	{9, regexp.MustCompile(`^initrd|init(rd|ramfs)`), "initrd", "a rebuilt initrd, after a kernel or driver update"},
	{9, regexp.MustCompile(`vmlinu|bzImage|/linux`), kernelImage, "a kernel update, or another kernel chosen in the boot menu"},
	{9, regexp.MustCompile(`\.cfg$|\.conf$|grubenv$|\.lst$`), "boot loader's configuration file", "GRUB's configuration was changed, or a kernel update"},
	{9, regexp.MustCompile(`\.mod$|\.pf2$`), "GRUB module", "a GRUB update"},
	{9, regexp.MustCompile(`^file`), "file that the boot loader read", "a boot loader or kernel update"},

	{11, regexp.MustCompile(`^section name`), sectionName, "a unified kernel image built in another way"},
	{11, regexp.MustCompile(`^section \.linux`), kernelImage, "a kernel update"},
	{11, regexp.MustCompile(`^section \.uname`), "kernel's version", "a kernel update"},
	{11, regexp.MustCompile(`^section \.initrd`), "initrd", "a rebuilt initrd, after a kernel or driver update"},
	{11, regexp.MustCompile(`^section \.cmdline`), kernelCmdline, "a unified kernel image built with another command line"},
	{11, regexp.MustCompile(`^section \.osrel`), "operating system's release", "an update of the operating system"},
	{11, regexp.MustCompile(`^section \.`), "section of the unified kernel image", "a new unified kernel image"},
	{11, regexp.MustCompile(`^systemd: `), bootPhase, "kleidi ran earlier or later in the boot: order its unit After=systemd-pcrphase.service"},
	{12, regexp.MustCompile(``), "command line, credentials or add-ons of the boot loader", "a changed boot entry, credential or add-on"},
	{13, regexp.MustCompile(``), "system extension", "a system extension added, removed or updated"},
	{14, regexp.MustCompile(`^shim`), "shim's key list", "a key enrolled or removed with mokutil, or a shim update"},
	{15, regexp.MustCompile(``), "identity of the system", "another root file system, or a new machine ID"},
	{anyPCR, regexp.MustCompile(``), "event", ""},
}

// explain puts a change into words.
func explain(c change, ctx circumstances) Difference {
	s := c.either()
	d := Difference{PCR: s.PCR, Was: say(c.was), Now: say(c.now)}
	for _, rule := range causes {
		if (rule.pcr == anyPCR || rule.pcr == s.PCR) && rule.what.MatchString(s.What) {
			d.Event, d.Cause = rule.event, rule.cause
			break
		}
	}
	switch {
	case ctx.secureBoot && s.PCR == 4 && d.Event == kernelImage && (c.was == nil || c.now == nil):
		d.Cause = "Secure Boot switched on or off: the kernel is then started in another way"
	case ctx.uki && d.Event == bootProgram:
		d.Event, d.Cause = "unified kernel image", "its kernel, initrd, command line or stub was updated"
	}
	if d.Event == bootPhase && c.now == nil {
		d.Cause += "; or the machine resumed from hibernation: reboot fully"
	}
	if c.was != nil && c.now != nil && d.Was == d.Now { // the text does not show the change
		d.Was, d.Now = short(c.was.Digest), short(c.now.Digest)
		if name := s.name(); name != "" {
			d.Event += " (" + name + ")"
		}
	}
	return d
}

// name returns the part that distinguishes an event from others of its kind, or "".
func (s Summary) name() string {
	kind, value := s.value()
	switch kind {
	case subjectImage, subjectDriver:
		value, _, _ = strings.Cut(value, ", ")
		if value == fromMemory {
			return ""
		}
	case subjectFile, subjectShim, subjectVolume:
	default:
		return ""
	}
	return printable(value, maxWhat)
}

// say returns an event's value, quoted if it is free text, or else its digest.
func say(s *Summary) string {
	if s == nil {
		return ""
	}
	kind, value := s.value()
	value = printable(value, maxWhat) // the value may come from a slot
	switch kind {
	case subjectCmdline, subjectGRUB, "action":
		return strconv.Quote(value)
	}
	return cmp.Or(value, short(s.Digest))
}

// isEcho reports whether a difference repeats another difference of the same PCR. GRUB
// measures the kernel's command line twice, once in its command and once as handed to
// the kernel. systemd-stub measures the name of each section before the content.
// Without Secure Boot, no event names a signer.
func isEcho(d Difference, all []Difference) bool {
	return slices.ContainsFunc(all, func(o Difference) bool {
		switch d.Event {
		case grubLinux:
			return o.Event == kernelCmdline
		case sectionName:
			return o.Event != sectionName
		case signer, sbat:
			return o.Event == secureBoot
		}
		return false
	})
}
