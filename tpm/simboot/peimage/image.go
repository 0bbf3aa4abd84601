// Package peimage makes and signs small PE images, including unified kernel images.
// Firmware would measure these files like real ones. They serve simulated boots, and
// tests that can't have real images. They do not run.
package peimage

import (
	"bytes"
	"encoding/binary"
)

// Section is a section of an image.
type Section struct {
	Name    string // at most 8 bytes
	Content []byte
}

// Layout of the images. The PE header comes after the first part of an x86 kernel
// image, so that a kernel's own header fits.
const (
	setupHeader = 0x202 // "HdrS"
	setupField  = 0x20e // the place of its version string, less 0x200
	setupText   = 0x220
	peHeader    = 0x280
	optional    = peHeader + 24
	checksum    = optional + 64
	security    = optional + 112 + 8*4
	table       = optional + 240
	headersSize = 0x1000
	fileAlign   = 0x200
	memoryAlign = 0x1000
)

// Image returns a PE32+ image for x86-64 with these sections, in this order.
func Image(sections ...Section) []byte {
	le := binary.LittleEndian
	b := make([]byte, headersSize)
	copy(b, "MZ")
	le.PutUint32(b[0x3c:], peHeader)
	copy(b[peHeader:], "PE\x00\x00")
	le.PutUint16(b[peHeader+4:], 0x8664)
	le.PutUint16(b[peHeader+6:], uint16(len(sections)))
	le.PutUint16(b[peHeader+20:], 240)    // size of the optional header
	le.PutUint16(b[peHeader+22:], 0x0206) // executable, large addresses
	le.PutUint16(b[optional:], 0x20b)
	le.PutUint32(b[optional+32:], memoryAlign)
	le.PutUint32(b[optional+36:], fileAlign)
	le.PutUint32(b[optional+60:], headersSize)
	le.PutUint16(b[optional+68:], 10) // EFI application
	le.PutUint32(b[optional+108:], 16)
	address := uint32(memoryAlign)
	for i, s := range sections {
		h := b[table+40*i:]
		copy(h[:8], s.Name)
		size := (len(s.Content) + fileAlign - 1) &^ (fileAlign - 1)
		le.PutUint32(h[8:], uint32(len(s.Content)))
		le.PutUint32(h[12:], address)
		le.PutUint32(h[16:], uint32(size))
		le.PutUint32(h[20:], uint32(len(b)))
		le.PutUint32(h[36:], 0x40000040) // initialised data, readable
		b = append(append(b, s.Content...), make([]byte, size-len(s.Content))...)
		address += uint32(len(s.Content)+memoryAlign) &^ (memoryAlign - 1)
	}
	le.PutUint32(b[optional+56:], address)
	return b
}

// Kernel returns an image with a version in an x86 kernel's header ("6.1.0-56-amd64")
// and with this content.
func Kernel(version, content string) []byte {
	b := Image(Section{".text", []byte(content)})
	copy(b[setupHeader:], "HdrS")
	binary.LittleEndian.PutUint16(b[setupField:], setupText-0x200)
	copy(b[setupText:peHeader-1], version+" (test)")
	return b
}

// UKI returns a unified kernel image with a systemd-stub of that version ("257.9"), and
// with these sections after the stub's own.
func UKI(stub string, sections ...Section) []byte {
	own := []Section{{".text", []byte("stub")}, {".sdmagic", []byte("#### LoaderInfo: systemd-stub " + stub + " ####\x00")}}
	return Image(append(own, sections...)...)
}

// Sections returns the sections of an image of this package.
func Sections(image []byte) []Section {
	le := binary.LittleEndian
	var sections []Section
	for i := range int(le.Uint16(image[peHeader+6:])) {
		h := image[table+40*i:]
		at := le.Uint32(h[20:])
		name := string(bytes.TrimRight(h[:8], "\x00"))
		sections = append(sections, Section{name, image[at : at+le.Uint32(h[8:])]})
	}
	return sections
}

// Hashed returns the bytes that the Authenticode digest of an image of this package
// covers.
func Hashed(image []byte) []byte {
	end := len(image)
	if at := binary.LittleEndian.Uint32(image[security:]); at != 0 {
		end = int(at)
	}
	return bytes.Join([][]byte{image[:checksum], image[checksum+4 : security], image[security+8 : end]}, nil)
}
