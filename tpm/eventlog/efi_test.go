package eventlog

import (
	"bytes"
	"encoding/binary"
	"reflect"
	"testing"
	"unicode/utf16"
)

func TestParseVariable(t *testing.T) {
	v := variable{securityDatabase, "dbx", []byte{1, 2, 3}}
	if got, err := parseVariable(v.encode()); err != nil || !reflect.DeepEqual(got, v) {
		t.Errorf("%+v, %v", got, err)
	}
	for name, edit := range map[string]func(b []byte) []byte{
		"truncated":      func(b []byte) []byte { return b[:len(b)-1] },
		"left over":      func(b []byte) []byte { return append(b, 0) },
		"empty":          func(b []byte) []byte { return nil },
		"name wraps":     func(b []byte) []byte { binary.LittleEndian.PutUint64(b[16:], 1<<63); return append(b[:32], 1, 2, 3) },
		"huge name":      func(b []byte) []byte { binary.LittleEndian.PutUint64(b[16:], 1<<62); return b },
		"huge data":      func(b []byte) []byte { binary.LittleEndian.PutUint64(b[24:], 1<<63); return b },
		"data too small": func(b []byte) []byte { b[24]--; return b },
	} {
		if got, err := parseVariable(edit(v.encode())); err == nil {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

func TestParseImageLoad(t *testing.T) {
	i := imageLoad{`\EFI\debian\grubx64.efi`, 4183488}
	if got, err := parseImageLoad(i.encode()); err != nil || got != i {
		t.Errorf("%+v, %v", got, err)
	}
	node := func(length uint16) []byte {
		b := binary.LittleEndian.AppendUint64(make([]byte, 24), 4)
		return append(b, nodeMedia, nodeFilePath, byte(length), byte(length>>8))
	}
	for name, b := range map[string][]byte{
		"truncated":    i.encode()[:40],
		"left over":    append(i.encode(), 0),
		"empty":        nil,
		"node of 0":    node(0),
		"node of 3":    node(3),
		"node too big": node(5),
	} {
		if got, err := parseImageLoad(b); err == nil {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

func TestCertificates(t *testing.T) {
	list := func(typ guid, size, entry uint32, body ...byte) []byte {
		b := binary.LittleEndian.AppendUint32(bytes.Clone(typ[:]), size)
		b = binary.LittleEndian.AppendUint32(b, 0)
		return append(binary.LittleEndian.AppendUint32(b, entry), body...)
	}
	two := append(list(certX509, 28+17, 17, append(make([]byte, 16), 'c')...), list(guid{}, 28+32, 16, make([]byte, 32)...)...)
	if certs, others, err := certificates(two); err != nil || len(certs) != 1 || string(certs[0]) != "c" || others != 2 {
		t.Errorf("%q, %d, %v", certs, others, err)
	}
	for name, b := range map[string][]byte{
		"truncated":        two[:len(two)-1],
		"left over":        append(bytes.Clone(two), 0),
		"list too small":   list(certX509, 27, 16),
		"entry of 0":       list(certX509, 28+16, 0, make([]byte, 16)...),
		"entry of 15":      list(certX509, 28+15, 15, make([]byte, 15)...),
		"part of an entry": list(certX509, 28+20, 16, make([]byte, 20)...),
	} {
		if certs, others, err := certificates(b); err == nil {
			t.Errorf("%s: %q, %d", name, certs, others)
		}
	}
}

// encode returns the event's data.
func (v variable) encode() []byte {
	name := encodeUTF16(v.name)
	b := binary.LittleEndian.AppendUint64(bytes.Clone(v.vendor[:]), uint64(len(name)/2))
	b = binary.LittleEndian.AppendUint64(b, uint64(len(v.data)))
	return append(append(b, name...), v.data...)
}

// encode returns the event's data.
func (i imageLoad) encode() []byte {
	le := binary.LittleEndian
	var path []byte
	if i.path != "" {
		name := encodeUTF16(i.path + "\x00")
		path = append(le.AppendUint16([]byte{nodeMedia, nodeFilePath}, uint16(4+len(name))), name...)
		path = append(path, nodeEnd, nodeEntireEnd, 4, 0)
	}
	b := le.AppendUint64(le.AppendUint64(nil, 0), i.size)
	b = le.AppendUint64(le.AppendUint64(b, 0), uint64(len(path)))
	return append(b, path...)
}

// taggedEvent returns the data of an EV_EVENT_TAG event (TCG_PCClientTaggedEvent).
func taggedEvent(id uint32, data []byte) []byte {
	b := binary.LittleEndian.AppendUint32(nil, id)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

func encodeUTF16(s string) []byte {
	var b []byte
	for _, u := range utf16.Encode([]rune(s)) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return b
}
