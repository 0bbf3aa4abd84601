package eventlog

import (
	"encoding/binary"
	"errors"
	"strings"
	"unicode/utf16"
)

// guid is an EFI_GUID in its memory layout.
type guid [16]byte

// Vendors of the measured variables (UEFI 2.10).
var (
	// globalVariable is EFI_GLOBAL_VARIABLE: SecureBoot, PK, KEK, BootOrder, Boot0000.
	globalVariable = guid{0x61, 0xdf, 0xe4, 0x8b, 0xca, 0x93, 0xd2, 0x11, 0xaa, 0x0d, 0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c}
	// securityDatabase is EFI_IMAGE_SECURITY_DATABASE_GUID: db, dbx.
	securityDatabase = guid{0xcb, 0xb2, 0x19, 0xd7, 0x3a, 0x3d, 0x96, 0x45, 0xa3, 0xbc, 0xda, 0xd0, 0x0e, 0x67, 0x65, 0x6f}
)

// variable is the data of the EV_EFI_VARIABLE events (UEFI_VARIABLE_DATA).
type variable struct {
	vendor guid
	name   string
	data   []byte
}

// certX509 is EFI_CERT_X509_GUID, the type of a list of certificates (UEFI 2.10, 32.4.1).
var certX509 = guid{0xa1, 0x59, 0xc0, 0xa5, 0xe4, 0x94, 0xa7, 0x4a, 0x87, 0xb5, 0xab, 0x15, 0x5c, 0x2b, 0xf0, 0x72}

// errNotThat says that data does not have the expected form.
var errNotThat = errors.New("data of another form")

// parseVariable reads an event's data, and refuses trailing bytes. The data refers to
// b.
func parseVariable(b []byte) (variable, error) {
	r := &reader{rest: b}
	var v variable
	copy(v.vendor[:], r.bytes(16))
	units, size := r.u64(), r.u64()
	if units > uint64(len(b)) { // or 2*units could wrap
		return variable{}, errNotThat
	}
	v.name = decodeUTF16(r.bytes(2 * units))
	v.data = r.bytes(size)
	if r.err != nil || len(r.rest) > 0 {
		return variable{}, errNotThat
	}
	return v, nil
}

// certificates returns the certificates in a signature database (a sequence of
// EFI_SIGNATURE_LIST), and the number of entries of other types.
func certificates(db []byte) (certs [][]byte, others int, err error) {
	r := &reader{rest: db}
	for len(r.rest) > 0 && r.err == nil {
		var typ guid
		copy(typ[:], r.bytes(16))
		list, header, entry := uint64(r.u32()), uint64(r.u32()), uint64(r.u32())
		if list < 28 || entry < 16 {
			return nil, 0, errNotThat
		}
		body := &reader{rest: r.bytes(list - 28)}
		body.bytes(header)
		if r.err != nil || body.err != nil {
			return nil, 0, errNotThat
		}
		for len(body.rest) > 0 {
			signature := body.bytes(entry)
			if body.err != nil {
				return nil, 0, errNotThat
			}
			if typ == certX509 {
				certs = append(certs, signature[16:]) // without the owner's GUID
			} else {
				others++
			}
		}
	}
	if r.err != nil {
		return nil, 0, errNotThat
	}
	return certs, others, nil
}

// imageLoad holds the used parts of the data of an image's event
// (UEFI_IMAGE_LOAD_EVENT). The digest of such an event is the image's digest, so it
// never proves these parts.
type imageLoad struct {
	// path is the path of the file, such as \EFI\BOOT\BOOTX64.EFI. It is empty for an
	// image that was loaded from memory, as GRUB does.
	path string
	// size is the size of the image, in bytes.
	size uint64
}

// Device path nodes (UEFI 2.10, 10.3).
const (
	nodeMedia, nodeFilePath = 4, 4
	nodeEnd, nodeEntireEnd  = 0x7f, 0xff
)

// parseImageLoad reads an event's data.
func parseImageLoad(b []byte) (imageLoad, error) {
	r := &reader{rest: b}
	r.u64() // its address in memory
	i := imageLoad{size: r.u64()}
	r.u64() // its link address
	path := r.bytes(r.u64())
	if r.err != nil || len(r.rest) > 0 {
		return imageLoad{}, errNotThat
	}
	r = &reader{rest: path}
	for len(r.rest) > 0 && r.err == nil {
		typ, sub, length := r.u8(), r.u8(), r.u16()
		if length < 4 {
			return imageLoad{}, errNotThat
		}
		body := r.bytes(uint64(length) - 4)
		if typ == nodeMedia && sub == nodeFilePath {
			name := strings.TrimRight(decodeUTF16(body), "\x00")
			if i.path != "" { // a path may consist of several nodes
				name = strings.TrimRight(i.path, `\`) + `\` + strings.TrimLeft(name, `\`)
			}
			i.path = name
		}
	}
	if r.err != nil {
		return imageLoad{}, errNotThat
	}
	return i, nil
}

// Tags that Linux's EFI stub gives its EV_EVENT_TAG events in PCR 9.
const (
	tagLinuxInitrd      = 0x8f3b22ec
	tagLinuxLoadOptions = 0x8f3b22ed
)

// parseTagged reads the data of an EV_EVENT_TAG event (TCG_PCClientTaggedEvent);
// ok is false for data of another form.
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
