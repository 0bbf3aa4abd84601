package simboot

import (
	"fmt"
	"slices"
	"strings"
	"unicode"
)

// Loader is the way from the firmware to the kernel.
type Loader string

// The loaders. They have the names of eventlog.BootType, except for Direct, which
// leaves no trace in the log.
const (
	// UKI is a unified kernel image with systemd-stub: PCR 4 and 11.
	UKI Loader = "uki"
	// GRUB is shim and GRUB: PCR 4, 8, 9 and 14.
	GRUB Loader = "grub"
	// EFIStub is a kernel that the firmware starts itself: PCR 4 and 9.
	EFIStub Loader = "efi-stub"
	// Direct is a kernel that the hypervisor hands to the firmware. The firmware starts
	// it and neither verifies nor measures it, even with Secure Boot on. PCR 9 has the
	// initrd.
	Direct Loader = "direct"
)

// Boot describes one boot of a machine. Each string stands for a content: the same
// string means the same content, another string another content; see [Boot.Files]. The
// comments list the PCRs that a change of the field moves. Boots are comparable.
type Boot struct {
	Loader Loader `json:"loader"`
	// Kernel is the kernel's version. UKI 4, 11; GRUB 4, 8, 9 (its files are
	// named after it); EFIStub 4; Direct none.
	Kernel string `json:"kernel"`
	// Initrd is the initial RAM disk. UKI 4, 9, 11; else 9.
	Initrd string `json:"initrd"`
	// CommandLine is the kernel's command line. UKI 4, 9, 11; GRUB 8, 9; EFIStub 9;
	// Direct none. An empty command line means a UKI without a .cmdline section.
	CommandLine string `json:"commandLine"`
	// LoaderVersion is the version of systemd-stub or of GRUB: 4. systemd-stub 252
	// measures fewer sections than later versions. The EFI stub is a part of its kernel
	// and has no version.
	LoaderVersion string `json:"loaderVersion,omitempty"`
	// Firmware is the firmware's build: 0.
	Firmware string `json:"firmware"`
	// SecureBoot says whether the firmware verifies what it starts: 0 (because the
	// recorded firmware measures another volume then), 4 (because the measurement of an
	// image differs if the loader verifies the image instead of starting it) and 7.
	// EFIStub and Direct: 0 and 7.
	SecureBoot bool `json:"secureBoot"`
	// Keys names the owner of PK, KEK and db: 7. Empty means that no keys are enrolled,
	// as in setup mode; Secure Boot is off then.
	Keys string `json:"keys,omitempty"`
	// Dbx is the revision of the forbidden signatures, or the revisions that were
	// installed one after the other, separated by commas: 7.
	Dbx string `json:"dbx,omitempty"`
	// Phases are the phases of user space that systemd-pcrphase has measured so
	// far, separated by colons, as systemd-measure has it: 11. Empty means that
	// user space measures nothing and that there is no userspace log.
	Phases string `json:"phases,omitempty"`
}

// AllPhases are the phases of a machine that has fully started.
const AllPhases = "enter-initrd:leave-initrd:sysinit:ready"

// Baseline returns an ordinary boot: a distribution's kernel, Secure Boot on
// (off with EFIStub, whose kernel nothing would verify), nothing measured by
// user space. Tests change single fields of it.
func Baseline(l Loader) Boot {
	b := Boot{
		Loader:      l,
		Kernel:      "6.12.57+deb13-amd64",
		Initrd:      "dracut 106, built for 6.12.57",
		CommandLine: "root=/dev/mapper/root ro quiet",
		Firmware:    "edk2 2025.02",
		SecureBoot:  true,
		Keys:        "Example Computers",
		Dbx:         "2025-06-11",
	}
	switch l {
	case UKI:
		b.LoaderVersion = "257.9"
	case GRUB:
		b.LoaderVersion = "2.12-9"
	case EFIStub:
		b.SecureBoot, b.Keys, b.Dbx = false, "", ""
	}
	return b
}

// maxField bounds each string of a Boot, in bytes, so that logs stay small. The kernel
// accepts no longer command line.
const maxField = 2048

// Validate refuses a boot that no machine can have.
func (b Boot) Validate() error {
	if !slices.Contains([]Loader{UKI, GRUB, EFIStub, Direct}, b.Loader) {
		return fmt.Errorf("loader %q is unknown; want %s, %s, %s or %s", b.Loader, UKI, GRUB, EFIStub, Direct)
	}
	for name, s := range map[string]string{"kernel": b.Kernel, "initrd": b.Initrd, "command line": b.CommandLine,
		"loader version": b.LoaderVersion, "firmware": b.Firmware, "keys": b.Keys, "dbx": b.Dbx, "phases": b.Phases} {
		if len(s) > maxField {
			return fmt.Errorf("%s has %d bytes, at most %d fit", name, len(s), maxField)
		}
		if strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
			return fmt.Errorf("%s holds a character that cannot be printed", name)
		}
	}
	if b.Kernel == "" {
		return fmt.Errorf("no kernel is named")
	}
	if b.SecureBoot && b.Keys == "" {
		return fmt.Errorf("secure boot is on, but no keys are enrolled; name their owner, or switch it off")
	}
	return nil
}
