package eventlog

import (
	"encoding/asn1"
	"slices"
)

// separators are the data of EV_SEPARATOR: two normal ones, and one that says that
// the firmware met an error (TCG PFP 1.06, 10.4.1).
var separators = [][]byte{{0, 0, 0, 0}, {0xff, 0xff, 0xff, 0xff}, errorSeparator: {1, 0, 0, 0}}

const errorSeparator = 2

// SecureBootState is what a log shows of Secure Boot, in words for a message.
type SecureBootState string

// The states. Only SecureBootOn says that a key vouched for what was started.
const (
	SecureBootOn  SecureBootState = "on"
	SecureBootOff SecureBootState = "off"
	// SecureBootIdle: the firmware says that it is on, and shows no key by which it
	// verified anything. A hypervisor that starts a kernel itself leaves this behind.
	SecureBootIdle SecureBootState = "on, and nothing was verified"
	// SecureBootUnknown: the log leaves a doubt.
	SecureBootUnknown SecureBootState = "unknown"
)

// SecureBoot tells whether Secure Boot is on or off, see [Log.SecureBootState]. known
// is false in the two other states: unknown means no.
func (l *Log) SecureBoot() (enabled, known bool) {
	s := l.SecureBootState()
	return s == SecureBootOn, s == SecureBootOn || s == SecureBootOff
}

// SecureBootState tells the state of Secure Boot from the events of PCR 7, if a log
// that verified leaves no doubt: whatever can't be shown to be so is unknown. It
// checks, in this order:
//
//  1. PCR 7 has exactly one separator, recognised by its digest, whatever its
//     type, and none that reports an error. What comes later was not measured by
//     the firmware as a setting, and the operating system could not have put
//     anything before it.
//  2. Every event before it has data that hashes to its digest, so that none can
//     pose as something else.
//  3. Exactly one of these is the variable SecureBoot of EFI_GLOBAL_VARIABLE, and
//     it holds one byte, 0 or 1, or nothing: firmware measures a variable that does
//     not exist that way, and Secure Boot is off then.
//  4. Where it is on: an authority from db is among the events, on either side of the
//     firmware's separator (boot loaders come after it) and before that of systemd,
//     which ends what came before the operating system. Any other authority, shim's
//     SBAT level for instance, is measured with Secure Boot off too.
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
// an image run: a variable db that holds an EFI_SIGNATURE_DATA, which is an owner's
// GUID with a certificate or a hash. The variable itself, which the firmware measures
// as a setting, holds EFI_SIGNATURE_LISTs. Types are not authenticated, so that the
// two are told apart by what they hold.
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
// refuses to parse some that firmware takes.
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
