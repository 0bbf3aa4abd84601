package eventlog

// separators are the data of EV_SEPARATOR: two normal ones, and one that says that
// the firmware met an error (TCG PFP 1.06, 10.4.1).
var separators = [][]byte{{0, 0, 0, 0}, {0xff, 0xff, 0xff, 0xff}, errorSeparator: {1, 0, 0, 0}}

const errorSeparator = 2

// SecureBoot tells the state of Secure Boot from the events of PCR 7, if a log
// that verified leaves no doubt: whatever can't be shown to be so is unknown, and
// unknown means no. It checks, in this order:
//
//  1. PCR 7 has exactly one separator, recognised by its digest, whatever its
//     type, and none that reports an error. What comes later was not measured by
//     the firmware, and the operating system could not have put anything before it.
//  2. Every event before it has data that hashes to its digest, so that none can
//     pose as something else.
//  3. Exactly one of these is the variable SecureBoot of EFI_GLOBAL_VARIABLE, and
//     it holds one byte, 0 or 1, or nothing: firmware measures a variable that does
//     not exist that way, and Secure Boot is off then.
func (l *Log) SecureBoot() (enabled, known bool) {
	before, ok := l.beforeSeparator()
	if !ok {
		return false, false
	}
	for _, e := range before {
		if !e.Proves(e.UntrustedData) {
			return false, false
		}
		v, err := parseVariable(e.UntrustedData)
		if err != nil || v.vendor != globalVariable || v.name != "SecureBoot" {
			continue
		}
		if known || len(v.data) > 1 || len(v.data) == 1 && v.data[0] > 1 {
			return false, false
		}
		enabled, known = len(v.data) == 1 && v.data[0] == 1, true
	}
	return enabled, known
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
