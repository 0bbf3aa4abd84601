package eventlog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"unicode/utf16"
)

// GUID is an EFI_GUID as it lies in memory.
type GUID [16]byte

// String returns the usual form, whose first three groups are little-endian.
func (g GUID) String() string {
	le := binary.LittleEndian
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", le.Uint32(g[:4]), le.Uint16(g[4:6]), le.Uint16(g[6:8]), g[8:10], g[10:])
}

// Vendors of the variables that are measured (UEFI 2.10; shim).
var (
	// GlobalVariable is EFI_GLOBAL_VARIABLE: SecureBoot, PK, KEK, BootOrder, Boot0000.
	GlobalVariable = GUID{0x61, 0xdf, 0xe4, 0x8b, 0xca, 0x93, 0xd2, 0x11, 0xaa, 0x0d, 0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c}
	// ImageSecurityDatabase is EFI_IMAGE_SECURITY_DATABASE_GUID: db, dbx.
	ImageSecurityDatabase = GUID{0xcb, 0xb2, 0x19, 0xd7, 0x3a, 0x3d, 0x96, 0x45, 0xa3, 0xbc, 0xda, 0xd0, 0x0e, 0x67, 0x65, 0x6f}
	// ShimLock is shim's: SbatLevel, MokListRT.
	ShimLock = GUID{0x50, 0xab, 0x5d, 0x60, 0x46, 0xe0, 0x00, 0x43, 0xab, 0xb6, 0x3d, 0xd8, 0x10, 0xdd, 0x8b, 0x23}
)

// Variable is the data of the EV_EFI_VARIABLE events (UEFI_VARIABLE_DATA).
type Variable struct {
	GUID GUID
	Name string
	Data []byte
}

// errNotThat says that data is not of the form that was asked for.
var errNotThat = errors.New("data of another form")

// ParseVariable reads an event's data; nothing may be left over. Data refers to b.
func ParseVariable(b []byte) (Variable, error) {
	r := &reader{rest: b}
	var v Variable
	copy(v.GUID[:], r.bytes(16))
	units, size := r.u64(), r.u64()
	if units > uint64(len(b)) { // or 2*units could wrap
		return Variable{}, errNotThat
	}
	v.Name = decodeUTF16(r.bytes(2 * units))
	v.Data = r.bytes(size)
	if r.err != nil || len(r.rest) > 0 {
		return Variable{}, errNotThat
	}
	return v, nil
}

// Encode returns the event's data.
func (v Variable) Encode() []byte {
	name := encodeUTF16(v.Name)
	b := binary.LittleEndian.AppendUint64(bytes.Clone(v.GUID[:]), uint64(len(name)/2))
	b = binary.LittleEndian.AppendUint64(b, uint64(len(v.Data)))
	return append(append(b, name...), v.Data...)
}

// ImageLoad is what is used of the data of an image's event (UEFI_IMAGE_LOAD_EVENT).
// Its digest is that of the image, so none of it is proven, ever.
type ImageLoad struct {
	// Path is the file's, as \EFI\BOOT\BOOTX64.EFI; empty for an image loaded
	// from memory, as GRUB does it.
	Path string
	// Size is that of the image, in bytes.
	Size uint64
}

// Device path nodes (UEFI 2.10, 10.3).
const (
	nodeMedia, nodeFilePath = 4, 4
	nodeEnd, nodeEntireEnd  = 0x7f, 0xff
)

// ParseImageLoad reads an event's data.
func ParseImageLoad(b []byte) (ImageLoad, error) {
	r := &reader{rest: b}
	r.u64() // where it was in memory
	i := ImageLoad{Size: r.u64()}
	r.u64() // where it was linked to
	path := r.bytes(r.u64())
	if r.err != nil || len(r.rest) > 0 {
		return ImageLoad{}, errNotThat
	}
	r = &reader{rest: path}
	for len(r.rest) > 0 && r.err == nil {
		typ, sub, length := r.u8(), r.u8(), r.u16()
		if length < 4 {
			return ImageLoad{}, errNotThat
		}
		body := r.bytes(uint64(length) - 4)
		if typ == nodeMedia && sub == nodeFilePath {
			i.Path += strings.TrimRight(decodeUTF16(body), "\x00")
		}
	}
	if r.err != nil {
		return ImageLoad{}, errNotThat
	}
	return i, nil
}

// Encode returns the event's data.
func (i ImageLoad) Encode() []byte {
	le := binary.LittleEndian
	var path []byte
	if i.Path != "" {
		name := encodeUTF16(i.Path + "\x00")
		path = append(le.AppendUint16([]byte{nodeMedia, nodeFilePath}, uint16(4+len(name))), name...)
		path = append(path, nodeEnd, nodeEntireEnd, 4, 0)
	}
	b := le.AppendUint64(le.AppendUint64(nil, 0), i.Size)
	b = le.AppendUint64(le.AppendUint64(b, 0), uint64(len(path)))
	return append(b, path...)
}

// Tags that Linux's EFI stub gives its EV_EVENT_TAG events in PCR 9.
const (
	TagLinuxInitrd      = 0x8f3b22ec
	TagLinuxLoadOptions = 0x8f3b22ed
)

// TaggedEvent returns the data of an EV_EVENT_TAG event (TCG_PCClientTaggedEvent).
func TaggedEvent(id uint32, data []byte) []byte {
	b := binary.LittleEndian.AppendUint32(nil, id)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// parseTagged reads such data; ok is false for data of another form.
func parseTagged(b []byte) (id uint32, data []byte, ok bool) {
	r := &reader{rest: b}
	id = r.u32()
	data = r.bytes(uint64(r.u32()))
	return id, data, r.err == nil && len(r.rest) == 0
}

func decodeUTF16(b []byte) string {
	u := make([]uint16, len(b)/2)
	for i := range u {
		u[i] = binary.LittleEndian.Uint16(b[2*i:])
	}
	return string(utf16.Decode(u))
}

func encodeUTF16(s string) []byte {
	var b []byte
	for _, u := range utf16.Encode([]rune(s)) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return b
}
