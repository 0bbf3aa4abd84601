// Package readonce finds protobuf messages that two readers could read in two ways. A
// signature or a quote covers bytes, but a verifier judges what its reader made of them.
package readonce

import (
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// maxDepth bounds the nesting of messages. An Attestation needs four levels.
const maxDepth = 16

// Check walks a message before it is unmarshalled. It proves that every reader of
// protobuf reads the same values: the message knows each field, each field has its own
// wire type and occurs once unless it is repeated; a oneof has one of its members, and
// a map has each key once. Unmarshalling alone would let the last of two values win,
// although another reader may take the first one, and would keep unknown fields
// silently.
func Check(b []byte, message protoreflect.MessageDescriptor) error {
	return check(0, b, message)
}

func check(depth int, b []byte, message protoreflect.MessageDescriptor) error {
	if depth == maxDepth {
		return fmt.Errorf("%s is nested too deep", message.FullName())
	}
	seen := map[string]bool{}
	for len(b) > 0 {
		number, typ, value, n := consumeField(b)
		if n < 0 {
			return fmt.Errorf("%s: %w", message.FullName(), protowire.ParseError(n))
		}
		b = b[n:]
		f := message.Fields().ByNumber(number)
		if f == nil || typ != wireType(f) {
			return fmt.Errorf("%s has an unknown field, number %d of wire type %d", message.FullName(), number, typ)
		}
		place := placeOf(f, value)
		if seen[place] && place != anywhere {
			return fmt.Errorf("%s appears twice", place)
		}
		seen[place] = true
		if f.Message() == nil {
			continue
		}
		inner, _ := protowire.ConsumeBytes(value)
		if err := check(depth+1, inner, f.Message()); err != nil {
			return err
		}
	}
	return nil
}

// consumeField returns the number, wire type and value of the field at the beginning of
// b, and the number of bytes that the field takes; a negative number means an error.
func consumeField(b []byte) (number protowire.Number, typ protowire.Type, value []byte, n int) {
	number, typ, tag := protowire.ConsumeTag(b)
	if tag < 0 {
		return 0, 0, nil, tag
	}
	size := protowire.ConsumeFieldValue(number, typ, b[tag:])
	if size < 0 {
		return 0, 0, nil, size
	}
	return number, typ, b[tag : tag+size], tag + size
}

// anywhere is the place of repeated fields.
const anywhere = ""

// placeOf names the place in the message that a field fills. Only one field may fill
// it.
func placeOf(f protoreflect.FieldDescriptor, value []byte) string {
	switch {
	case f.IsMap():
		entry, _ := protowire.ConsumeBytes(value)
		return fmt.Sprintf("%s[%d]", f.FullName(), mapKey(entry))
	case f.IsList():
		return anywhere
	case f.ContainingOneof() != nil:
		return string(f.ContainingOneof().FullName())
	}
	return string(f.FullName())
}

// mapKey returns the key of a map's entry. All maps in an Attestation have keys of 32
// bits, and readers cut a longer number to 32 bits. A missing key means 0.
func mapKey(entry []byte) uint32 {
	for len(entry) > 0 {
		number, typ, value, n := consumeField(entry)
		if n < 0 {
			break // check finds it when it walks the entry
		}
		if number == 1 && typ == protowire.VarintType {
			key, _ := protowire.ConsumeVarint(value)
			return uint32(key)
		}
		entry = entry[n:]
	}
	return 0
}

func wireType(f protoreflect.FieldDescriptor) protowire.Type {
	switch {
	case f.IsPacked():
		return protowire.BytesType
	case f.Kind() == protoreflect.Fixed32Kind || f.Kind() == protoreflect.Sfixed32Kind || f.Kind() == protoreflect.FloatKind:
		return protowire.Fixed32Type
	case f.Kind() == protoreflect.Fixed64Kind || f.Kind() == protoreflect.Sfixed64Kind || f.Kind() == protoreflect.DoubleKind:
		return protowire.Fixed64Type
	case f.Kind() == protoreflect.StringKind || f.Kind() == protoreflect.BytesKind || f.Kind() == protoreflect.MessageKind:
		return protowire.BytesType
	}
	return protowire.VarintType
}
