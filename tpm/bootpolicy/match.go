package bootpolicy

import (
	"bytes"
	"crypto"
	"crypto/sha256"
	"encoding/asn1"
	"encoding/binary"
	"encoding/hex"
	"strings"
	"unicode/utf16"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// key is a proven property of an event, such as its digest. An entry and an event match if
// they have a key in common. Keys of different kinds begin with different words.
type key string

func digestKey(digest []byte) key      { return key("digest " + string(digest)) }
func commandLineKey(args string) key   { return key("commandLine " + args) }
func certificateKey(digest []byte) key { return key("certificate " + string(digest)) }

// keys returns the keys of which an event must have one to match the entry.
func (e Entry) keys(bank crypto.Hash) []key {
	switch e.Form {
	case FormText:
		var keys []key
		for _, measured := range encodings(e.Value) {
			keys = append(keys, digestKey(sum(bank, measured)))
		}
		return keys
	case FormCommandLine:
		return []key{commandLineKey(e.Value)}
	case FormCertificate, FormDigest:
		value, err := hex.DecodeString(e.Value)
		if err != nil {
			return nil
		}
		if e.Form == FormCertificate {
			return []key{certificateKey(value)}
		}
		return []key{digestKey(value)}
	}
	return nil
}

// encodings returns the forms in which firmware and boot loaders measure a text.
func encodings(s string) [][]byte {
	var wide []byte
	for _, u := range utf16.Encode([]rune(s)) {
		wide = binary.LittleEndian.AppendUint16(wide, u)
	}
	return [][]byte{[]byte(s), append([]byte(s), 0), wide, append(bytes.Clone(wide), 0, 0)}
}

func sum(bank crypto.Hash, b []byte) []byte {
	h := bank.New()
	h.Write(b)
	return h.Sum(nil)
}

// event is an event that extended a judged PCR, with its keys.
type event struct {
	eventlog.Event
	index  int // in the log
	digest []byte
	keys   []key
}

// what describes the measured content to people. Its source is untrusted.
func (e event) what() string {
	log := &eventlog.Log{Events: []eventlog.Event{e.Event}}
	return log.Summarize(e.Digests[0].Hash, []int{e.PCR})[0].What
}

// proven returns the keys of an event, whose log has the judged bank alone. It reads data
// only if the hash of the data is the digest.
func proven(e eventlog.Event, digest []byte) []key {
	keys := []key{digestKey(digest)}
	switch e.PCR {
	case 7:
		if c := authority(e); c != nil {
			digest := sha256.Sum256(c)
			keys = append(keys, certificateKey(digest[:]))
		}
	case 8:
		if args, ok := kernelArguments(e); ok {
			keys = append(keys, commandLineKey(args))
		}
	}
	return keys
}

// kernelArguments returns the arguments of a kernel that GRUB loads or starts:
//
//	grub_cmd: linux /vmlinuz root=/dev/sda1    or    kernel_cmdline: /vmlinuz root=/dev/sda1
//
// The digest does not cover the prefix, so an attacker could exchange the two prefixes. That
// does no harm: a path is not a command, and other commands that load something, such as
// chainloader or linux16, are not recognised.
func kernelArguments(e eventlog.Event) (string, bool) {
	text, ok := grubText(e)
	if !ok {
		return "", false
	}
	file, args, _ := strings.Cut(strings.TrimPrefix(text, "linux "), " ")
	return args, strings.HasPrefix(file, "/") || strings.HasPrefix(file, "(")
}

// grubText returns the text of an event of GRUB, and whether the digest proves it.
func grubText(e eventlog.Event) (string, bool) {
	for _, prefix := range []string{"grub_cmd: ", "kernel_cmdline: "} {
		if text, ok := bytes.CutPrefix(e.UntrustedData, []byte(prefix)); ok {
			text = bytes.TrimSuffix(text, []byte{0})
			return string(text), e.Proves(text) || e.Proves(append(bytes.Clone(text), 0))
		}
	}
	return "", false
}

// authority returns the certificate by which the firmware or shim let a program run, or nil
// if the event holds none. Such an event holds a variable (UEFI_VARIABLE_DATA, TCG PFP 1.06,
// 10.2.6) with an EFI_SIGNATURE_DATA, which is an owner's GUID and a certificate. Older
// versions of shim leave out the GUID. The event must claim to be an authority, because
// other events can hold certificates too.
func authority(e eventlog.Event) []byte {
	const owner = 16 // bytes of a GUID
	if e.UntrustedType != eventlog.EFIVariableAuthority || !e.Proves(e.UntrustedData) {
		return nil
	}
	_, value, ok := splitVariable(e.UntrustedData)
	switch {
	case !ok:
		return nil
	case len(value) > owner && isSequence(value[owner:]):
		return value[owner:]
	case isSequence(value):
		return value
	}
	return nil // a hash, or another variable, such as shim's SbatLevel
}

// isSequence reports whether b is one whole ASN.1 SEQUENCE, as a certificate is. It does not
// parse the certificate, because Go refuses some that firmware accepts.
func isSequence(b []byte) bool {
	var v asn1.RawValue
	rest, err := asn1.Unmarshal(b, &v)
	return err == nil && len(rest) == 0 && v.Class == asn1.ClassUniversal && v.Tag == asn1.TagSequence && v.IsCompound
}

// splitVariable takes a UEFI_VARIABLE_DATA apart; nothing may be left over.
func splitVariable(b []byte) (name, value []byte, ok bool) {
	const head = 32 // GUID, length of the name in UTF-16 units, length of the value
	if len(b) < head {
		return nil, nil, false
	}
	units, size := binary.LittleEndian.Uint64(b[16:]), binary.LittleEndian.Uint64(b[24:])
	rest := uint64(len(b) - head)
	if units > rest/2 || size != rest-2*units {
		return nil, nil, false
	}
	return b[head : head+2*units], b[head+2*units:], true
}

// separator is the data of a separator.
type separator int

const (
	noSeparator separator = iota
	goodSeparator
	errorSeparator // the firmware met an error
)

// separatorOf recognises a separator by its digest (TCG PFP 1.06, 10.4.1).
func separatorOf(e eventlog.Event) separator {
	switch {
	case e.Proves([]byte{0, 0, 0, 0}) || e.Proves([]byte{0xff, 0xff, 0xff, 0xff}):
		return goodSeparator
	case e.Proves([]byte{1, 0, 0, 0}):
		return errorSeparator
	}
	return noSeparator
}
