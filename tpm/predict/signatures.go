package predict

import (
	"bytes"
	"encoding/binary"
	"errors"
)

// maxDatabase bounds a signature database, in bytes. Firmware keeps 32 to 256 KB.
const maxDatabase = 1 << 20

// signatureList is an EFI_SIGNATURE_LIST (UEFI 2.10, 32.4.1).
type signatureList struct {
	typ    guid
	header []byte
	// entries are EFI_SIGNATURE_DATA: the owner's GUID and a certificate or a hash,
	// all of one size.
	entries [][]byte
}

var errDatabase = errors.New("not a sequence of EFI_SIGNATURE_LISTs")

// parseDatabase reads a whole signature database, and refuses trailing bytes.
func parseDatabase(b []byte) ([]signatureList, error) {
	if len(b) > maxDatabase {
		return nil, errDatabase
	}
	var lists []signatureList
	for r := (&reader{rest: b}); len(r.rest) > 0; {
		l := signatureList{typ: r.guid()}
		length, header, size := r.uint(4), r.uint(4), r.uint(4)
		if r.err != nil || length < 28 || size <= 16 {
			return nil, errDatabase
		}
		body := &reader{rest: r.bytes(length - 28)}
		l.header = body.bytes(header)
		for r.err == nil && body.err == nil && len(body.rest) > 0 {
			l.entries = append(l.entries, body.bytes(size))
		}
		if r.err != nil || body.err != nil || len(l.entries) == 0 {
			return nil, errDatabase
		}
		lists = append(lists, l)
	}
	return lists, nil
}

// encode returns the list as in the variable; a list without entries is empty.
func (l signatureList) encode() []byte {
	if len(l.entries) == 0 {
		return nil
	}
	size := len(l.entries[0])
	b := bytes.Clone(l.typ[:])
	b = binary.LittleEndian.AppendUint32(b, uint32(28+len(l.header)+size*len(l.entries)))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(l.header)))
	b = binary.LittleEndian.AppendUint32(b, uint32(size))
	return append(append(b, l.header...), bytes.Join(l.entries, nil)...)
}

// entrySet holds entries with the type of their list, which firmware compares as well.
type entrySet map[string]bool

func (s entrySet) add(lists []signatureList) {
	for _, l := range lists {
		for _, e := range l.entries {
			s[string(l.typ[:])+string(e)] = true
		}
	}
}

func (s entrySet) has(typ guid, entry []byte) bool { return s[string(typ[:])+string(entry)] }
