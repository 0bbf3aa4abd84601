package bootpolicy

import (
	"bytes"
	"fmt"
	"strconv"
)

const header = `# kleidi's boot policy: what this machine's event log must show.
# Only the digests decide. Comments say what was measured when they were recorded,
# as the log claims it. docs/boot-policy.md explains each rule.
`

// about says what a PCR holds (TCG PFP 1.06, 3.3.4; UAPI Group, Linux TPM PCR Registry).
var about = [maxPCR + 1]string{
	0: "firmware", 1: "settings of the firmware", 2: "drivers of devices", 3: "settings of devices",
	4: "boot loader, or unified kernel image", 5: "partition table, settings of the boot loader", 6: "by the manufacturer",
	7: "Secure Boot: state, keys, authorities", 8: "GRUB: commands and command lines", 9: "files that GRUB read; command line and initrd as the kernel got them",
	10: "IMA", 11: "unified kernel image: its sections; phases of the boot", 12: "command line, credentials and add-ons of the boot loader",
	13: "system extensions", 14: "shim's key lists", 15: "identity of the system",
}

// Marshal writes a boot policy in the form that Parse reads, with its notes as
// comments. The same boot policy always gives the same bytes.
func (p *BootPolicy) Marshal() []byte {
	var b bytes.Buffer
	b.WriteString(header)
	fmt.Fprintf(&b, "apiVersion: %s\nkind: %s\nbank: %s\n", APIVersion, Kind, p.Bank)
	if p.SecureBoot != "" {
		fmt.Fprintf(&b, "secureBoot: %s\n", p.SecureBoot)
	}
	p.Firmware.marshal(&b)
	b.WriteString("pcrs:\n")
	for _, pcr := range p.Demanded() {
		comment := ""
		if pcr >= 0 && pcr <= maxPCR {
			comment = "  # " + about[pcr]
		}
		fmt.Fprintf(&b, "  %d:%s\n", pcr, comment)
		p.PCRs[pcr].marshal(&b)
	}
	return b.Bytes()
}

func (f Firmware) marshal(b *bytes.Buffer) {
	if f.StartupLocality == nil && len(f.Versions) == 0 {
		return
	}
	b.WriteString("firmware:\n")
	if f.StartupLocality != nil {
		fmt.Fprintf(b, "  startupLocality: %d\n", *f.StartupLocality)
	}
	if len(f.Versions) > 0 {
		b.WriteString("  versions:\n")
	}
	for _, v := range f.Versions {
		fmt.Fprintf(b, "    - %s\n", strconv.Quote(v))
	}
}

func (r Rule) marshal(b *bytes.Buffer) {
	if r.Separator != nil {
		fmt.Fprintf(b, "    separator: %t\n", *r.Separator)
	}
	if r.Any {
		b.WriteString("    any: true\n")
	}
	if r.Allowed != nil {
		b.WriteString("    allowed:\n")
		for _, e := range r.Allowed {
			e.marshal(b, "      - ")
		}
	}
	if r.Sequences != nil {
		b.WriteString("    sequences:\n")
	}
	for _, list := range r.Sequences {
		indent := "      - - "
		if len(list) == 0 {
			b.WriteString("      - []\n")
		}
		for _, e := range list {
			e.marshal(b, indent)
			indent = "        - "
		}
	}
}

// marshal writes an entry. Go quotes valid UTF-8 in a way that YAML reads.
func (e Entry) marshal(b *bytes.Buffer, indent string) {
	value := fmt.Sprintf("%s: %s", e.Form, strconv.Quote(e.Value))
	if e.Form == FormDigest {
		value = e.Value
	}
	b.WriteString(indent + value)
	if e.Note != "" {
		b.WriteString("  # " + note(e.Note))
	}
	b.WriteByte('\n')
}
