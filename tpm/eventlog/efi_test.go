package eventlog

import (
	"bytes"
	"encoding/binary"
	"unicode/utf16"
)

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
