package eventlog

import (
	"encoding/asn1"
	"slices"
)

// separators are the data of EV_SEPARATOR: two normal values, and one that reports an
// error of the firmware (TCG PFP 1.06, 10.4.1).
var separators = [][]byte{{0, 0, 0, 0}, {0xff, 0xff, 0xff, 0xff}, errorSeparator: {1, 0, 0, 0}}

const errorSeparator = 2

// SecureBootState is the state of Secure Boot in a log, in words for a message.
type SecureBootState string

// The states. Only SecureBootOn means that a key vouched for a started image.
const (
	SecureBootOn  SecureBootState = "on"
	SecureBootOff SecureBootState = "off"
	// SecureBootIdle: the firmware says that Secure Boot is on, and shows no key by
	// which it verified anything. This is the result if a hypervisor starts a kernel
	// directly.
	SecureBootIdle SecureBootState = "on, and nothing was verified"
	// SecureBootUnknown: the log leaves a doubt.
	SecureBootUnknown SecureBootState = "unknown"
)

// SecureBoot reports whether Secure Boot is on or off, see [Log.SecureBootState]. known
// is false in the two other states; treat unknown as off.
func (l *Log) SecureBoot() (enabled, known bool) {
	s := l.SecureBootState()
	return s == SecureBootOn, s == SecureBootOn || s == SecureBootOff
}

// SecureBootState derives the state of Secure Boot from the events of PCR 7 in a
// verified log. If anything leaves a doubt, the state is unknown. It checks, in this
// order:
//
//  1. PCR 7 has exactly one separator, recognised by its digest regardless of its type, and
//     no separator that reports an error. The firmware measured no setting after the
//     separator, and the operating system can't have put anything before it.
//  2. Every event before the separator has data that hashes to its digest, so that no event
//     can pose as another one.
//  3. Exactly one of these events is the variable SecureBoot of EFI_GLOBAL_VARIABLE, and it
//     holds one byte, 0 or 1, or nothing. Firmware measures a missing variable as empty, and
//     Secure Boot is off then.
//  4. If Secure Boot is on: an authority from db is among the events, on either side of the
//     firmware's separator (boot loaders come after it) and before systemd's separator, after
//     which events belong to the operating system. Any other authority, for instance shim's
//     SBAT level, does not count, because it is measured with Secure Boot off too.
func (l *Log) SecureBootState() SecureBootState {
	before, ok := l.beforeSeparator()
	if !ok {
		return SecureBootUnknown
	}
	state := SecureBootUnknown
	for _, e := range before {
		if !e.Proves(e.UntrustedData) {
			return SecureBootUnknown
		}
		v, err := parseVariable(e.UntrustedData)
		if err != nil || v.vendor != globalVariable || v.name != "SecureBoot" {
			continue
		}
		if state != SecureBootUnknown || len(v.data) > 1 || len(v.data) == 1 && v.data[0] > 1 {
			return SecureBootUnknown
		}
		if state = SecureBootOff; len(v.data) == 1 && v.data[0] == 1 {
			state = SecureBootIdle
		}
	}
	if state == SecureBootIdle && l.hasBeforeOS(7, isAuthority) {
		state = SecureBootOn
	}
	return state
}

// isAuthority reports whether an event names an entry of db by which the firmware let
// an image run. The data is then a variable db that holds an EFI_SIGNATURE_DATA, an
// owner's GUID with a certificate or a hash. The variable db itself, which the firmware
// measures as a setting, holds EFI_SIGNATURE_LISTs. Types are not authenticated, so
// isAuthority distinguishes the two by their content.
func isAuthority(e Event) bool {
	const owner = 16 // bytes of a GUID
	if e.UntrustedType != EFIVariableAuthority || !e.Proves(e.UntrustedData) {
		return false
	}
	v, err := parseVariable(e.UntrustedData)
	if err != nil || v.vendor != securityDatabase || v.name != "db" || len(v.data) <= owner {
		return false
	}
	if _, _, err := certificates(v.data); err == nil {
		return false
	}
	return isSequence(v.data[owner:]) || slices.Contains([]int{32, 48, 64}, len(v.data)-owner)
}

// isSequence reports whether b is one whole ASN.1 SEQUENCE, as a certificate is. Go
// refuses to parse some certificates that firmware accepts.
func isSequence(b []byte) bool {
	var v asn1.RawValue
	rest, err := asn1.Unmarshal(b, &v)
	return err == nil && len(rest) == 0 && v.Class == asn1.ClassUniversal && v.Tag == asn1.TagSequence && v.IsCompound
}

// beforeSeparator returns the events of PCR 7 before its only separator.
func (l *Log) beforeSeparator() (before []Event, ok bool) {
	n := 0
	for _, e := range l.Events {
		if e.PCR != 7 || !e.extends() {
			continue
		}
		switch kind := separatorKind(e); {
		case kind < 0 && e.UntrustedType == Separator || kind == errorSeparator:
			return nil, false
		case kind >= 0:
			n++
			if !e.Proves(separators[kind]) {
				return nil, false
			}
		case n == 0:
			before = append(before, e)
		}
	}
	return before, n == 1
}

// separatorKind returns an index of separators if any digest says so, else -1.
func separatorKind(e Event) int {
	for i, s := range separators {
		if e.mayBe(s) {
			return i
		}
	}
	return -1
}
