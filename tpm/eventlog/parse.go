package eventlog

import (
	"bytes"
	"crypto"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// signature begins the data of the first event in a crypto-agile log.
const signature = "Spec ID Event03\x00"

// orDefault supplies a header for logs that are built by hand.
func (s specID) orDefault() specID {
	if s.major == 0 {
		return specID{major: 2, uintnSize: 2}
	}
	return s
}

// Errors of logs that are valid and useless.
var (
	// ErrEmptyLog: the firmware, or the hypervisor, handed Linux no events.
	ErrEmptyLog = errors.New("the log is empty")
	// ErrSHA1Log: the log is in the SHA-1-only format of TPM 1.2.
	ErrSHA1Log = errors.New("the log is in the SHA-1 format of TPM 1.2")
)

// Parse reads a crypto-agile firmware log of at most [MaxSize] bytes and [MaxEvents]
// events. It is strict if a log could be read in two ways: the header names each bank
// once, with its right size; an event has at most one digest for each of these banks,
// and none for another bank; EV_NO_ACTION has digests of zeros; there are no trailing
// bytes. It is lenient about known errors of firmware that the replay decides: an event
// may lack the digests of some banks, and an event on a PCR that does not exist extends
// nothing. Encode turns an accepted log back into the same bytes. The Log does not
// refer to raw.
func Parse(raw []byte) (*Log, error) {
	switch {
	case len(raw) == 0:
		return nil, fmt.Errorf("event log: %w", ErrEmptyLog)
	case len(raw) > MaxSize:
		return nil, fmt.Errorf("event log: %d bytes, more than %d", len(raw), MaxSize)
	}
	r := &reader{rest: bytes.Clone(raw)}
	l, err := r.header()
	if err != nil {
		return nil, fmt.Errorf("event log: header: %w", err)
	}
	for n := 0; len(r.rest) > 0; n++ {
		if n == MaxEvents {
			return nil, fmt.Errorf("event log: more than %d events", MaxEvents)
		}
		e, err := r.event(l.Banks)
		if err != nil {
			return nil, fmt.Errorf("event log: event %d at byte %d: %w", n, len(raw)-len(r.rest), err)
		}
		l.Events = append(l.Events, e)
	}
	return l, nil
}

var errTruncated = errors.New("truncated")

// reader takes fields off a log. After an error every field is zero or nil, so one
// check for each structure is enough.
type reader struct {
	rest []byte
	err  error
}

func (r *reader) bytes(n uint64) []byte {
	if r.err != nil || n > uint64(len(r.rest)) {
		r.err = errTruncated
		return nil
	}
	b := r.rest[:n:n]
	r.rest = r.rest[n:]
	return b
}

func (r *reader) u8() uint8 {
	if b := r.bytes(1); b != nil {
		return b[0]
	}
	return 0
}

func (r *reader) u16() uint16 {
	if b := r.bytes(2); b != nil {
		return binary.LittleEndian.Uint16(b)
	}
	return 0
}

func (r *reader) u32() uint32 {
	if b := r.bytes(4); b != nil {
		return binary.LittleEndian.Uint32(b)
	}
	return 0
}

func (r *reader) u64() uint64 {
	if b := r.bytes(8); b != nil {
		return binary.LittleEndian.Uint64(b)
	}
	return 0
}

// header reads the first event, which has the TPM 1.2 form so that old readers can skip
// it.
func (r *reader) header() (*Log, error) {
	pcr, typ, digest := r.u32(), EventType(r.u32()), r.bytes(20)
	data := r.bytes(uint64(r.u32()))
	switch {
	case r.err != nil:
		return nil, r.err
	case !bytes.HasPrefix(data, []byte(signature)):
		return nil, ErrSHA1Log
	case pcr != 0 || typ != NoAction || !zero(digest):
		return nil, errors.New("the Spec ID event must be EV_NO_ACTION on PCR 0 with a digest of zeros")
	}
	return parseSpecID(data[len(signature):])
}

func parseSpecID(data []byte) (*Log, error) {
	r := &reader{rest: data}
	l := &Log{spec: specID{platformClass: r.u32(), minor: r.u8(), major: r.u8(), errata: r.u8(), uintnSize: r.u8()}}
	n := r.u32()
	switch {
	case r.err != nil:
		return nil, r.err
	case l.spec.major != 2 || l.spec.minor != 0:
		return nil, fmt.Errorf("specification version %d.%d, want 2.0", l.spec.major, l.spec.minor)
	case n == 0 || n > uint32(len(algorithms)):
		return nil, fmt.Errorf("%d banks, want 1 to %d", n, len(algorithms))
	}
	for range n {
		id, length := r.u16(), int(r.u16())
		bank := bankOf(id)
		switch {
		case r.err != nil:
			return nil, r.err
		case bank == 0:
			return nil, fmt.Errorf("unknown bank, TPM_ALG_ID %#04x", id)
		case length != size(bank):
			return nil, fmt.Errorf("%s digests of %d bytes", BankName(bank), length)
		case slices.Contains(l.Banks, bank):
			return nil, fmt.Errorf("%s named twice", BankName(bank))
		}
		l.Banks = append(l.Banks, bank)
	}
	l.spec.vendorInfo = r.bytes(uint64(r.u8()))
	if r.err == nil && len(r.rest) > 0 {
		return nil, fmt.Errorf("%d bytes left over", len(r.rest))
	}
	return l, r.err
}

// event reads a TCG_PCR_EVENT2.
func (r *reader) event(banks []crypto.Hash) (Event, error) {
	pcr, typ, n := r.u32(), EventType(r.u32()), r.u32()
	e := Event{PCR: int(pcr), UntrustedType: typ}
	if pcr == noPCR {
		e.PCR = NoPCR
	}
	switch {
	case r.err != nil:
		return e, r.err
	case n > uint32(len(banks)):
		return e, fmt.Errorf("%d digests for %d banks", n, len(banks))
	}
	e.Digests = make([]Digest, 0, n)
	for range n {
		id := r.u16()
		bank := bankOf(id)
		switch {
		case r.err != nil:
			return e, r.err
		case !slices.Contains(banks, bank):
			return e, fmt.Errorf("a digest of a bank that the header does not name, TPM_ALG_ID %#04x", id)
		case e.Digest(bank) != nil:
			return e, fmt.Errorf("two %s digests", BankName(bank))
		}
		e.Digests = append(e.Digests, Digest{bank, r.bytes(uint64(size(bank)))})
	}
	e.UntrustedData = r.bytes(uint64(r.u32()))
	if r.err == nil && typ == NoAction && slices.ContainsFunc(e.Digests, func(d Digest) bool { return !zero(d.Value) }) {
		return e, errors.New("EV_NO_ACTION with a digest that is not zeros")
	}
	return e, r.err
}

// noPCR is NoPCR in a log.
const noPCR = 0xffffffff

func zero(b []byte) bool { return !slices.ContainsFunc(b, func(c byte) bool { return c != 0 }) }

// Encode returns the log in the form that [Parse] reads.
func (l *Log) Encode() []byte {
	le := binary.LittleEndian
	spec := l.spec.orDefault()
	id := le.AppendUint32([]byte(signature), spec.platformClass)
	id = append(id, spec.minor, spec.major, spec.errata, spec.uintnSize)
	id = le.AppendUint32(id, uint32(len(l.Banks)))
	for _, bank := range l.Banks {
		id = le.AppendUint16(id, algID(bank))
		id = le.AppendUint16(id, uint16(size(bank)))
	}
	id = append(append(id, uint8(len(spec.vendorInfo))), spec.vendorInfo...)

	b := le.AppendUint32(make([]byte, 0, 4096), 0)
	b = le.AppendUint32(b, uint32(NoAction))
	b = append(b, make([]byte, 20)...)
	b = append(le.AppendUint32(b, uint32(len(id))), id...)
	for _, e := range l.Events {
		b = le.AppendUint32(b, uint32(e.PCR)) // NoPCR becomes noPCR
		b = le.AppendUint32(b, uint32(e.UntrustedType))
		b = le.AppendUint32(b, uint32(len(e.Digests)))
		for _, d := range e.Digests {
			b = append(le.AppendUint16(b, algID(d.Hash)), d.Value...)
		}
		b = append(le.AppendUint32(b, uint32(len(e.UntrustedData))), e.UntrustedData...)
	}
	return b
}
