package eventlog

import (
	"bytes"
	"cmp"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// maxWhat bounds Summary.What, in runes.
const maxWhat = 160

// fromMemory stands for the path of an image that was not loaded from a file.
const fromMemory = "loaded from memory"

// claimed marks data whose hash should be the event's digest but is not: the log
// differs from the measurement.
const claimed = " (claimed, not proven)"

// Names of subjects, which Compare uses too. The description of an event is "subject"
// or "subject: value". Two events with the same subject in two boots are the same
// measurement.
const (
	subjectSecureBoot  = "Secure Boot"
	subjectCmdline     = "kernel_cmdline"
	subjectGRUB        = "grub_cmd"
	subjectImage       = "image"
	subjectDriver      = "driver"
	subjectFile        = "file"
	subjectSection     = "section"
	subjectSectionName = "section name"
	subjectLoadOptions = "load options"
	subjectInitrd      = "initrd"
	subjectSystemd     = "systemd"
	subjectShim        = "shim"
	subjectAuthority   = "authorised by"
	subjectSBAT        = "SBAT level"
	subjectVolume      = "firmware volume"
	subjectVersion     = "firmware version"
	subjectGPT         = "partition table"
)

// describe says what an event measures, in at most maxWhat printable runes. The text is
// for display, and its source is untrusted.
func describe(e Event) string {
	d := e.UntrustedData
	var s string
	switch e.UntrustedType {
	case Separator:
		s = describeSeparator(e)
	case EFIVariableDriverConfig, EFIVariableBoot, EFIVariableBoot2, EFIVariableAuthority:
		s = describeVariable(e)
	case EFIBootServicesApp, EFIBootServicesDriver, EFIRuntimeServicesDriver:
		s = describeImage(e)
	case Action, EFIAction:
		s = "action: " + text(d) + e.mark(d)
	case CRTMVersion:
		s = subjectVersion
		if !zero(d) {
			s += ": " + text(d)
		}
	case EFIPlatformFirmwareBlob, EFIPlatformFirmwareBlob2:
		s = describeVolume(d)
	case EFIGPTEvent, EFIGPTEvent2:
		s = subjectGPT
	case EventTag:
		s = describeTagged(e)
	case IPL:
		s = describeIPL(e)
	default:
		s = text(d)
	}
	return printable(s, maxWhat)
}

// mark returns the mark for an event that should have measured these bytes.
func (e Event) mark(measured []byte) string {
	if e.Proves(measured) {
		return ""
	}
	return claimed
}

func describeSeparator(e Event) string {
	switch kind := separatorKind(e); {
	case kind < 0:
		return "separator" + claimed
	case kind == errorSeparator:
		return "separator: the firmware met an error"
	default:
		return "separator" + e.mark(separators[kind])
	}
}

func describeVariable(e Event) string {
	v, err := parseVariable(e.UntrustedData)
	if err != nil {
		return fmt.Sprintf("variable: %d bytes", len(e.UntrustedData))
	}
	mark := e.mark(e.UntrustedData)
	boot := e.UntrustedType == EFIVariableBoot || e.UntrustedType == EFIVariableBoot2
	if boot && mark != "" { // older firmware measures only the value
		mark = e.mark(v.data)
	}
	switch {
	case v.name == "SbatLevel":
		return subjectSBAT + ": " + text(v.data) + mark
	case e.UntrustedType == EFIVariableAuthority && len(v.data) > 16:
		return subjectAuthority + " " + v.name + ": " + describeSigner(v.data) + mark
	case v.vendor == globalVariable && v.name == "SecureBoot":
		return subjectSecureBoot + ": " + onOff(v.data) + mark
	case v.name == "PK" || v.name == "KEK" || v.name == "db" || v.name == "dbx" || v.name == "dbt" || v.name == "dbr":
		return v.name + ": " + describeKeys(v.data) + mark
	case boot && v.name == "BootOrder":
		return v.name + ": " + describeBootOrder(v.data) + mark
	case boot && len(v.data) > 6: // EFI_LOAD_OPTION: attributes, length, name
		name, _, _ := strings.Cut(decodeUTF16(v.data[6:min(len(v.data), 6+2*maxWhat)]), "\x00")
		return v.name + ": " + name + mark
	default:
		return fmt.Sprintf("variable %s: %d bytes%s", v.name, len(v.data), mark)
	}
}

func onOff(data []byte) string {
	if bytes.Equal(data, []byte{1}) {
		return "on"
	}
	return "off"
}

func describeBootOrder(data []byte) string {
	var s []string
	for i := 0; i+1 < min(len(data), 64); i += 2 {
		s = append(s, fmt.Sprintf("%04X", binary.LittleEndian.Uint16(data[i:])))
	}
	return strings.Join(s, ", ")
}

// describeSigner reads an EFI_SIGNATURE_DATA: an owner's GUID and a certificate
// or a hash.
func describeSigner(data []byte) string {
	return cmp.Or(subject(data[16:]), fmt.Sprintf("%d bytes", len(data)))
}

func describeKeys(db []byte) string {
	certs, others, err := certificates(db)
	if err != nil {
		return fmt.Sprintf("%d bytes", len(db))
	}
	var s []string
	for _, c := range certs[:min(len(certs), 8)] {
		s = append(s, cmp.Or(subject(c), "a certificate"))
	}
	if len(s) < len(certs) {
		s = append(s, fmt.Sprintf("%d more", len(certs)-len(s)))
	}
	if others > 0 {
		s = append(s, plural(others, "hash", "hashes"))
	}
	return cmp.Or(strings.Join(s, ", "), "none")
}

func plural(n int, one, more string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, more)
}

// subject returns the common name of a certificate, or "".
func subject(der []byte) string {
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return ""
	}
	return cmp.Or(c.Subject.CommonName, strings.Join(c.Subject.Organization, " "))
}

func describeImage(e Event) string {
	kind := subjectImage
	if e.UntrustedType != EFIBootServicesApp {
		kind = subjectDriver
	}
	i, err := parseImageLoad(e.UntrustedData)
	if err != nil {
		return kind
	}
	return fmt.Sprintf("%s: %s, %d bytes", kind, cmp.Or(i.path, fromMemory), i.size)
}

// describeVolume reads a UEFI_PLATFORM_FIRMWARE_BLOB, or BLOB2, which begins with a name.
func describeVolume(data []byte) string {
	name := ""
	if len(data) > 16 && int(data[0]) == len(data)-17 {
		name, data = text(data[1:len(data)-16])+", ", data[len(data)-16:]
	}
	if len(data) != 16 {
		return subjectVolume
	}
	le := binary.LittleEndian
	return fmt.Sprintf("%s: %s%d bytes at %#x", subjectVolume, name, le.Uint64(data[8:]), le.Uint64(data))
}

func describeTagged(e Event) string {
	id, data, ok := parseTagged(e.UntrustedData)
	switch {
	case ok && id == tagLinuxInitrd:
		return subjectInitrd
	case ok && id == tagLinuxLoadOptions:
		return subjectLoadOptions
	case ok:
		return fmt.Sprintf("tag %#x: %s", id, text(data))
	case bytes.HasPrefix(e.UntrustedData, []byte("cryptsetup:")): // keyed with the volume's key
		return subjectSystemd + ": " + text(e.UntrustedData)
	default:
		return subjectSystemd + ": " + text(e.UntrustedData) + e.mark(e.UntrustedData)
	}
}

// describeIPL describes events of boot loaders; the PCR identifies the boot loader.
func describeIPL(e Event) string {
	if prefix, command := splitGRUB(e.UntrustedData); prefix != "" {
		s := prefix + strings.ToValidUTF8(string(command), "?")
		if !isGRUBCommand(e) {
			s += claimed
		}
		return s
	}
	s := text(e.UntrustedData)
	switch {
	case e.PCR == 9:
		return subjectFile + ": " + s
	case e.PCR == 11 && e.Proves([]byte(s+"\x00")):
		return subjectSectionName + " " + s
	case e.PCR == 11:
		return subjectSection + " " + s
	case e.PCR == 14:
		return subjectShim + ": " + s
	default:
		return s
	}
}

// text returns UTF-8 or UTF-16 text as a string, or the size of any other data.
func text(data []byte) string {
	const enough = 64 << 10 // no measured text is longer
	cut := data[:min(len(data), enough)]
	s := strings.TrimRight(strings.ToValidUTF8(string(cut), ""), "\x00")
	if isUTF16(cut) {
		s = strings.TrimRight(decodeUTF16(cut), "\x00")
	}
	if s == "" || strings.ContainsFunc(s, func(r rune) bool { return r == utf8.RuneError || r < ' ' && !unicode.IsSpace(r) }) ||
		!isUTF16(cut) && len(cut) < enough && !utf8.Valid(cut) {
		return fmt.Sprintf("%d bytes", len(data))
	}
	return s
}

// printable makes a line of untrusted text safe for a terminal or a log: no control or
// formatting characters, single spaces, at most n runes. It cuts the middle out of a
// longer line, because command lines usually differ at their ends.
func printable(s string, n int) string {
	s = strings.Join(strings.Fields(strings.Map(func(r rune) rune {
		switch {
		case unicode.IsSpace(r):
			return ' '
		case !unicode.IsPrint(r):
			return '?'
		}
		return r
	}, s)), " ")
	runes := []rune(s)
	if len(runes) <= n {
		return s
	}
	head := n * 2 / 3
	return string(runes[:head]) + "…" + string(runes[len(runes)-(n-head-1):])
}
