package simboot

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"unicode/utf16"
)

// guid is an EFI_GUID in its memory layout.
type guid [16]byte

// GUIDs of variables' namespaces and of signature types (UEFI 2.10, 3.3 and
// 32.4.1; shim, include/guid.h).
var (
	guidGlobal   = mustGUID("61dfe48bca93d211aa0d00e098032b8c") // EFI_GLOBAL_VARIABLE
	guidSecurity = mustGUID("cbb219d73a3d9645a3bcdad00e67656f") // EFI_IMAGE_SECURITY_DATABASE_GUID
	guidShim     = mustGUID("50ab5d6046e00043abb63dd810dd8b23") // SHIM_LOCK_GUID
	guidX509     = mustGUID("a159c0a5e494a74a87b5ab155c2bf072") // EFI_CERT_X509_GUID
	guidSHA256   = mustGUID("2616c4c14c509240aca941f936934328") // EFI_CERT_SHA256_GUID
	guidPKCS7    = mustGUID("9dd2af4adf68ee498aa9347d375665a7") // EFI_CERT_TYPE_PKCS7_GUID
)

func mustGUID(s string) (g guid) {
	copy(g[:], mustHex(s))
	return g
}

func mustHex(s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return b
}

// ownerGUID derives a SignatureOwner from a name.
func ownerGUID(name string) (g guid) {
	sum := sha256.Sum256([]byte(name))
	copy(g[:], sum[:])
	return g
}

// utf16le encodes s as the firmware does, without a terminator.
func utf16le(s string) []byte {
	var b []byte
	for _, u := range utf16.Encode([]rune(s)) {
		b = binary.LittleEndian.AppendUint16(b, u)
	}
	return b
}

// utf16z is utf16le with the terminating zero.
func utf16z(s string) []byte { return append(utf16le(s), 0, 0) }

// variable returns a UEFI_VARIABLE_DATA (PC Client Platform Firmware Profile 1.06, 10.2.6).
func variable(namespace guid, name string, value []byte) []byte {
	b := bytes.Clone(namespace[:])
	b = binary.LittleEndian.AppendUint64(b, uint64(len(utf16.Encode([]rune(name)))))
	b = binary.LittleEndian.AppendUint64(b, uint64(len(value)))
	b = append(b, utf16le(name)...)
	return append(b, value...)
}

// signatureList returns an EFI_SIGNATURE_LIST; all entries have the same size.
func signatureList(typ, owner guid, entries ...[]byte) []byte {
	var data []byte
	for _, e := range entries {
		data = append(append(data, owner[:]...), e...)
	}
	b := bytes.Clone(typ[:])
	b = binary.LittleEndian.AppendUint32(b, uint32(28+len(data)))
	b = binary.LittleEndian.AppendUint32(b, 0) // SignatureHeaderSize
	b = binary.LittleEndian.AppendUint32(b, uint32(len(data)/len(entries)))
	return append(b, data...)
}

// imageLoad returns an EFI_IMAGE_LOAD_EVENT (PC Client Platform Firmware Profile 1.06, 10.2.3).
func imageLoad(address, size uint64, path []byte) []byte {
	var b []byte
	for _, v := range []uint64{address, size, 0, uint64(len(path))} {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	return append(b, path...)
}

// pathEnd ends a device path.
var pathEnd = mustHex("7fff0400")

// filePath returns a device path's node for a file.
func filePath(name string) []byte {
	text := utf16z(name)
	b := []byte{4, 4}
	b = binary.LittleEndian.AppendUint16(b, uint16(4+len(text)))
	return append(b, text...)
}

// diskPath is Acpi(PNP0A03)/Pci(3,0)/HD(1,GPT): the EFI system partition.
var diskPath = mustHex("02010c00d041030a00000000" + "010106000003" +
	"04012a00010000000008000000000000" + "0000020000000000aaaaaaaabbbbccccddddeeeeeeeeeeee0202")

// gpt is a UEFI_GPT_DATA: a header and one EFI system partition.
func gpt() []byte {
	b := []byte("EFI PART")
	b = append(b, mustHex("000001005c0000000000000000000000")...) // revision, size, CRC
	for _, lba := range []uint64{1, 0x20fff, 0x800, 0x20fde} {
		b = binary.LittleEndian.AppendUint64(b, lba)
	}
	b = append(b, mustHex("11111111222233334444555555555555")...) // disk
	b = binary.LittleEndian.AppendUint64(b, 2)
	b = append(b, mustHex("800000008000000000000000")...) // entries, size, CRC
	b = binary.LittleEndian.AppendUint64(b, 1)            // NumberOfPartitions
	b = append(b, mustHex("28732ac11ff8d211ba4b00a0c93ec93b")...)
	b = append(b, mustHex("aaaaaaaabbbbccccddddeeeeeeeeeeee")...)
	for _, v := range []uint64{0x800, 0x207ff, 0} {
		b = binary.LittleEndian.AppendUint64(b, v)
	}
	name := make([]byte, 72)
	copy(name, utf16le("ESP"))
	return append(b, name...)
}

// taggedEvent returns a TCG_PCClientTaggedEvent.
func taggedEvent(id uint32, text string) []byte {
	b := binary.LittleEndian.AppendUint32(nil, id)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(text)+1))
	return append(append(b, text...), 0)
}

// bootOption returns an EFI_LOAD_OPTION.
func bootOption(attributes uint32, title string, path []byte) []byte {
	b := binary.LittleEndian.AppendUint32(nil, attributes)
	b = binary.LittleEndian.AppendUint16(b, uint16(len(path)))
	return append(append(b, utf16z(title)...), path...)
}
