package bootpolicy

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/beezy-dev/kleidi/internal/strictyaml"
)

// Parse reads a boot policy of at most [MaxSize] bytes. It is strict: it refuses unknown and
// duplicate keys, wrong types, more than one document, and rules that can't hold. The error
// lists every problem with the path of its key, one per line.
func Parse(b []byte) (*BootPolicy, error) {
	if len(b) > MaxSize {
		return nil, fmt.Errorf("boot policy: %d bytes, more than %d", len(b), MaxSize)
	}
	p, problems := &BootPolicy{}, &strictyaml.Problems{}
	if err := strictyaml.Decode(b, p, problems); err != nil {
		return nil, fmt.Errorf("boot policy: %w", err)
	}
	p.validate(problems)
	if err := problems.Err(); err != nil {
		return nil, fmt.Errorf("boot policy:\n%w", err)
	}
	return p, nil
}

// UnmarshalNode implements strictyaml.Unmarshaler. An entry is a digest, or a mapping of one
// key to its text. The comment on its line is its note.
func (e *Entry) UnmarshalNode(n *yaml.Node, path string, problems *strictyaml.Problems) {
	if n.Kind == yaml.ScalarNode {
		*e = Entry{FormDigest, n.Value, note(n.LineComment)}
		return
	}
	if n.Kind != yaml.MappingNode || len(n.Content) != 2 {
		problems.Add(path, "line %d: want a digest, or one of the keys %s, %s and %s", n.Line, FormText, FormCommandLine, FormCertificate)
		return
	}
	problems.EachKey(n, path, func(k, v *yaml.Node, at string) {
		form := Form(k.Value)
		switch {
		case form != FormText && form != FormCommandLine && form != FormCertificate:
			problems.Add(at, "line %d: unknown key; want %s, %s or %s", k.Line, FormText, FormCommandLine, FormCertificate)
		case v.Kind != yaml.ScalarNode || v.Tag == "!!null":
			problems.Add(at, "line %d: want text in quotes", v.Line)
		default:
			*e = Entry{form, v.Value, note(v.LineComment)}
		}
	})
}

// Validate reports every rule that can't hold. The results of Parse and Record have none.
func (p *BootPolicy) Validate() error {
	problems := &strictyaml.Problems{}
	p.validate(problems)
	if err := problems.Err(); err != nil {
		return fmt.Errorf("boot policy:\n%w", err)
	}
	return nil
}

func (p *BootPolicy) validate(problems *strictyaml.Problems) {
	if p.APIVersion != APIVersion {
		problems.Add("apiVersion", "%q; want %s", p.APIVersion, APIVersion)
	}
	if p.Kind != Kind {
		problems.Add("kind", "%q; want %s", p.Kind, Kind)
	}
	if p.Hash() == 0 {
		problems.Add("bank", "%q; want sha256 or sha384", p.Bank)
	}
	p.validateSecureBoot(problems)
	p.validateFirmware(problems)
	if len(p.PCRs) == 0 {
		problems.Add("pcrs", "it names no PCR; nothing would be judged")
	}
	entries := 0
	for _, pcr := range p.Demanded() {
		path := fmt.Sprintf("pcrs.%d", pcr)
		if pcr < 0 || pcr > maxPCR {
			problems.Add(path, "PCR %d does not exist or can be reset without a reboot; want 0 to %d", pcr, maxPCR)
			continue
		}
		entries += p.validateRule(pcr, path, problems)
	}
	if entries > MaxEntries {
		problems.Add("pcrs", "%d entries, more than %d", entries, MaxEntries)
	}
}

func (p *BootPolicy) validateSecureBoot(problems *strictyaml.Problems) {
	switch p.SecureBoot {
	case "":
		return
	case SecureBootEnabled, SecureBootDisabled:
	default:
		problems.Add("secureBoot", "%q; want %s or %s", p.SecureBoot, SecureBootEnabled, SecureBootDisabled)
	}
	if _, ok := p.PCRs[7]; !ok {
		problems.Add("secureBoot", "nothing proves it without PCR 7; add pcrs.7, or leave secureBoot out")
	}
}

func (p *BootPolicy) validateFirmware(problems *strictyaml.Problems) {
	if f := p.Firmware; f.StartupLocality == nil && len(f.Versions) == 0 {
		return
	}
	if _, ok := p.PCRs[0]; !ok {
		problems.Add("firmware", "nothing proves it without PCR 0; add pcrs.0, or leave firmware out")
	}
	if l := p.Firmware.StartupLocality; l != nil && (*l < 0 || *l > 4) {
		problems.Add("firmware.startupLocality", "%d; want 0 to 4", *l)
	}
	if len(p.Firmware.Versions) > MaxEntries {
		problems.Add("firmware.versions", "%d entries, more than %d", len(p.Firmware.Versions), MaxEntries)
	}
	for i, v := range p.Firmware.Versions {
		if err := validText(v); err != nil {
			problems.Add(fmt.Sprintf("firmware.versions[%d]", i), "%w", err)
		}
	}
}

// validateRule returns how many entries the rule has.
func (p *BootPolicy) validateRule(pcr int, path string, problems *strictyaml.Problems) int {
	r := p.PCRs[pcr]
	given := 0
	for _, has := range []bool{r.Any, r.Allowed != nil, r.Sequences != nil} {
		if has {
			given++
		}
	}
	switch {
	case given != 1:
		problems.Add(path, "want one of any: true, allowed and sequences")
	case r.Allowed != nil && len(r.Allowed) == 0:
		problems.Add(path+".allowed", "it is empty; of a PCR without events write sequences: [[]]")
	case r.Sequences != nil && len(r.Sequences) == 0:
		problems.Add(path+".sequences", "it is empty; of a PCR without events write sequences: [[]]")
	}
	if r.Separator != nil && *r.Separator && pcr > lastSeparated {
		problems.Add(path+".separator", "PCR %d has none; only PCR 0 to %d do", pcr, lastSeparated)
	}
	p.validateEntries(r.Allowed, pcr, path+".allowed", problems)
	entries := len(r.Allowed) + len(r.Sequences)
	for i, list := range r.Sequences {
		p.validateEntries(list, pcr, fmt.Sprintf("%s.sequences[%d]", path, i), problems)
		entries += len(list)
	}
	return entries
}

func (p *BootPolicy) validateEntries(list []Entry, pcr int, path string, problems *strictyaml.Problems) {
	for i, e := range list {
		if err := p.validEntry(e, pcr); err != nil {
			problems.Add(fmt.Sprintf("%s[%d]", path, i), "%w", err)
		}
	}
}

func (p *BootPolicy) validEntry(e Entry, pcr int) error {
	switch {
	case e.Form == FormDigest:
		if bank := p.Hash(); bank != 0 && !isHex(e.Value, bank.Size()) {
			return fmt.Errorf("%q is no %s digest; want %d lower-case hexadecimal digits", clip(e.Value), p.Bank, 2*bank.Size())
		}
	case e.Form == FormCertificate && pcr != 7:
		return fmt.Errorf("PCR %d measures no certificates; PCR 7 does", pcr)
	case e.Form == FormCertificate:
		if !isHex(e.Value, sha256.Size) {
			return fmt.Errorf("%q is no SHA-256 digest of a certificate; want %d lower-case hexadecimal digits", clip(e.Value), 2*sha256.Size)
		}
	case e.Form == FormCommandLine && pcr != 8:
		return fmt.Errorf("no digest of PCR %d backs a command line without its kernel's file; write it as %s", pcr, FormText)
	case e.Form == FormText || e.Form == FormCommandLine:
		return validText(e.Value)
	default: // UnmarshalNode could not read it, and has reported that
		return errors.New("it is no entry")
	}
	return nil
}

func validText(s string) error {
	if len(s) > maxText {
		return fmt.Errorf("%d bytes, more than %d", len(s), maxText)
	}
	if s != strings.ToValidUTF8(s, "") {
		return errors.New("it is not UTF-8")
	}
	return nil
}

func isHex(s string, size int) bool {
	b, err := hex.DecodeString(s)
	return err == nil && len(b) == size && s == strings.ToLower(s)
}

// clip bounds a value in a message, in bytes.
func clip(s string) string { return s[:min(len(s), 128)] }
