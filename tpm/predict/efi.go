package predict

import (
	"bytes"
	"encoding/binary"
	"errors"
	"unicode/utf16"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

var errTruncated = errors.New("truncated")

// reader takes little-endian fields off bytes. After an error every field is zero or
// nil, so one check for each structure is enough.
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

func (r *reader) uint(size uint64) (v uint64) {
	for i, b := range r.bytes(size) {
		v |= uint64(b) << (8 * i)
	}
	return v
}

func (r *reader) guid() (g guid) {
	copy(g[:], r.bytes(16))
	return g
}

// guid is an EFI_GUID in its memory layout.
type guid [16]byte

// UEFI 2.10, 3.3, 8.2.2 and 32.4.1.
var (
	globalVariable   = guid{0x61, 0xdf, 0xe4, 0x8b, 0xca, 0x93, 0xd2, 0x11, 0xaa, 0x0d, 0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c}
	securityDatabase = guid{0xcb, 0xb2, 0x19, 0xd7, 0x3a, 0x3d, 0x96, 0x45, 0xa3, 0xbc, 0xda, 0xd0, 0x0e, 0x67, 0x65, 0x6f}
	certX509         = guid{0xa1, 0x59, 0xc0, 0xa5, 0xe4, 0x94, 0xa7, 0x4a, 0x87, 0xb5, 0xab, 0x15, 0x5c, 0x2b, 0xf0, 0x72}
	certSHA256       = guid{0x26, 0x16, 0xc4, 0xc1, 0x4c, 0x50, 0x92, 0x40, 0xac, 0xa9, 0x41, 0xf9, 0x36, 0x93, 0x43, 0x28}
	certPKCS7        = guid{0x9d, 0xd2, 0xaf, 0x4a, 0xdf, 0x68, 0xee, 0x49, 0x8a, 0xa9, 0x34, 0x7d, 0x37, 0x56, 0x65, 0xa7}
)

// variable is the data of an event that measures a UEFI variable (UEFI_VARIABLE_DATA,
// TCG PFP 1.06, 10.2.6).
type variable struct {
	vendor guid
	name   string
	data   []byte
}

// parseVariable reads an event's data, and refuses trailing bytes.
func parseVariable(b []byte) (v variable, ok bool) {
	r := &reader{rest: b}
	v.vendor = r.guid()
	units, size := r.uint(8), r.uint(8)
	if units > uint64(len(b)) { // or 2*units could wrap
		return v, false
	}
	v.name = fromUTF16(r.bytes(2 * units))
	v.data = r.bytes(size)
	return v, r.err == nil && len(r.rest) == 0
}

// encode returns what [parseVariable] reads.
func (v variable) encode() []byte {
	name := toUTF16(v.name)
	b := bytes.Clone(v.vendor[:])
	b = binary.LittleEndian.AppendUint64(b, uint64(len(name)/2))
	b = binary.LittleEndian.AppendUint64(b, uint64(len(v.data)))
	return append(append(b, name...), v.data...)
}

func fromUTF16(b []byte) string {
	u := make([]uint16, len(b)/2)
	for i := range u {
		u[i] = binary.LittleEndian.Uint16(b[2*i:])
	}
	return string(utf16.Decode(u))
}

func toUTF16(s string) []byte {
	var b []byte
	for _, u := range utf16.Encode([]rune(s)) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return b
}

// toUTF16Z is toUTF16 with the terminating zero.
func toUTF16Z(s string) []byte { return append(toUTF16(s), 0, 0) }

// Tags that Linux's EFI stub gives its EV_EVENT_TAG events in PCR 9.
const (
	tagInitrd      = 0x8f3b22ec
	tagLoadOptions = 0x8f3b22ed
)

// tagged returns the tag of an event of Linux's EFI stub, or 0.
func tagged(e eventlog.Event) uint64 {
	r := &reader{rest: e.UntrustedData}
	id := r.uint(4)
	r.bytes(r.uint(4))
	if e.UntrustedType != eventlog.EventTag || r.err != nil || len(r.rest) > 0 || id != tagInitrd && id != tagLoadOptions {
		return 0
	}
	return id
}

// isApplication recognises the event of an image that was loaded in order to be
// started.
func isApplication(e eventlog.Event) bool {
	r := &reader{rest: e.UntrustedData}
	r.bytes(24) // its address in memory, its size, its link address
	r.bytes(r.uint(8))
	return e.UntrustedType == eventlog.EFIBootServicesApp && r.err == nil && len(r.rest) == 0
}

// resized returns the data of an image's event with the image's size replaced.
func resized(data []byte, size int) []byte {
	data = bytes.Clone(data)
	binary.LittleEndian.PutUint64(data[8:], uint64(size))
	return data
}

// provesItself reports whether the event measured its own data.
func provesItself(e eventlog.Event) bool {
	return len(e.UntrustedData) > 0 && e.Proves(e.UntrustedData)
}
