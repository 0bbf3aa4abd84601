package bootpolicy

import (
	"crypto"
	"fmt"
	"maps"
	"slices"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// APIVersion and Kind open every boot policy.
const (
	APIVersion = "kleidi.beezy.dev/v1alpha1"
	Kind       = "BootPolicy"
)

// Limits on a boot policy. A real one has 20 to 300 entries in 3 to 50 KB.
const (
	MaxSize    = 1 << 20 // bytes of a file
	MaxEntries = 4096    // entries of all its lists together
	maxText    = 4096    // bytes of one text; the kernel takes a shorter command line
	maxPCR     = 15      // some PCRs above it can be reset without a reboot
)

// BootPolicy holds the demands on a boot. Make one with [Parse] or [Record].
type BootPolicy struct {
	APIVersion string `yaml:"apiVersion"`
	Kind       string `yaml:"kind"`
	// Bank is the one bank that is judged, sha256 or sha384.
	Bank string `yaml:"bank"`
	// SecureBoot is the state that PCR 7 must prove; empty demands none.
	SecureBoot SecureBoot `yaml:"secureBoot"`
	Firmware   Firmware   `yaml:"firmware"`
	// PCRs holds the rule of every PCR that a quote must cover, and of no other.
	PCRs map[int]Rule `yaml:"pcrs"`
}

// SecureBoot is a state of Secure Boot.
type SecureBoot string

// The states of Secure Boot that can be demanded.
const (
	SecureBootEnabled  SecureBoot = "enabled"
	SecureBootDisabled SecureBoot = "disabled"
)

// Firmware holds the demands on PCR 0 beyond its list.
type Firmware struct {
	// StartupLocality is the locality from which the TPM was started: 0, 3 or 4. PCR 0
	// begins with it. Absent means any. A TPM that was reset and extended again behind
	// the firmware's back shows 0 although the firmware starts it from 3.
	StartupLocality *int `yaml:"startupLocality"`
	// Versions are the S-CRTM versions that are allowed; none demands none.
	Versions []string `yaml:"versions" want:"a version in quotes"`
}

// Rule holds the demands on one PCR: exactly one of Any, Allowed and Sequences.
type Rule struct {
	// Separator demands exactly one separator, which ends the firmware's
	// measurements; absent means true for PCR 0 to 7, which have one.
	Separator *bool `yaml:"separator"`
	// Any accepts every list of events that leads to the quoted value.
	Any bool `yaml:"any"`
	// Allowed lists entries; each event must match one of them, in any order and number.
	Allowed []Entry `yaml:"allowed"`
	// Sequences are lists of entries; one list must match all events, in their order.
	// An empty list stands for a PCR without events.
	Sequences [][]Entry `yaml:"sequences"`
}

// Form says how an Entry names what was measured.
type Form string

// The forms of entries. All but FormDigest are keys in the file.
const (
	// FormDigest is the event's digest, in lower-case hexadecimal.
	FormDigest Form = "digest"
	// FormText is text that was measured, as UTF-8 or UTF-16, with a final zero or
	// without.
	FormText Form = "text"
	// FormCommandLine, for PCR 8 alone, is GRUB's command that loads a kernel, or the
	// kernel's command line, with these arguments and any kernel file.
	FormCommandLine Form = "commandLine"
	// FormCertificate, for PCR 7 alone, is an authority: the SHA-256 digest of the
	// certificate (DER) by which the firmware let a program run.
	FormCertificate Form = "certificate"
)

// Entry is one thing that may have been measured.
type Entry struct {
	Form  Form
	Value string
	// Note is the comment behind it, at most 160 printable runes. It decides nothing.
	Note string
}

// Hash returns the bank that is judged, or 0 if there is no such bank.
func (p *BootPolicy) Hash() crypto.Hash {
	switch p.Bank {
	case "sha256":
		return crypto.SHA256
	case "sha384":
		return crypto.SHA384
	}
	return 0
}

// Demanded returns the PCRs that a quote must cover, ascending.
func (p *BootPolicy) Demanded() []int { return slices.Sorted(maps.Keys(p.PCRs)) }

// Claimed returns the values of the demanded PCRs to which the log leads. A verdict on them
// judges the log's claims, and proves nothing.
func (p *BootPolicy) Claimed(log *eventlog.Log) (eventlog.PCRs, error) {
	bank := p.Hash()
	replayed, err := log.Replay(bank)
	if err != nil {
		return nil, err
	}
	claimed := eventlog.PCRs{}
	for pcr := range p.PCRs {
		if claimed[pcr] = replayed[pcr]; claimed[pcr] == nil {
			claimed[pcr] = make([]byte, bank.Size())
		}
	}
	return claimed, nil
}

// wantsSeparator reports whether the rule demands exactly one separator.
func (r Rule) wantsSeparator(pcr int) bool {
	return pcr <= lastSeparated && (r.Separator == nil || *r.Separator)
}

// lastSeparated is the last PCR into which the firmware measures a separator (TCG PFP 1.06,
// 3.3.4).
const lastSeparated = 7

// String returns the entry in the form that people read.
func (e Entry) String() string {
	s := fmt.Sprintf("%s %q", e.Form, e.Value)
	if e.Form == FormDigest {
		s = short(e.Value)
	}
	if e.Note != "" {
		s += " (" + e.Note + ")"
	}
	return printable(s, 2*maxNote)
}
