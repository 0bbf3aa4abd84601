package predict

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
)

// Limits on the tables of a PE file. Real files have up to 20 sections.
const (
	maxSections   = 96
	maxSignatures = 16
)

// image is a PE/COFF image: a UKI, a kernel with an EFI stub, a boot loader.
// It refers to the file's bytes.
type image struct {
	file     []byte
	sections []section
	// hashed are the parts of the file that its Authenticode digest covers, in order.
	hashed [][]byte
	// signatures are the PKCS#7 signatures of its certificate table.
	signatures [][]byte
}

type section struct {
	name    string
	content []byte // VirtualSize bytes, as in memory
	// its place in memory
	start, end uint64
	whole      bool // the file contains all of the content
}

// errNotPE says that a file is not a PE image.
var errNotPE = errors.New("not a PE image")

// PE format (Microsoft, "PE Format"): offsets from the start of the part.
const (
	peOffsetAt    = 0x3c
	coffSize      = 24 // signature and COFF header
	checksumAt    = 64 // in the optional header
	headersSizeAt = 60
	sectionSize   = 40
	securityEntry = 4 // of the data directories
)

// parsePE reads an image of at most [MaxFile] bytes. It is stricter than firmware: it refuses
// images that different readers would hash differently (sections that overlap, are out of
// order in the file, or reach beyond its end; a certificate table that is not last).
func parsePE(file []byte) (*image, error) {
	h, err := parseHeaders(file)
	if err != nil {
		return nil, err
	}
	img := &image{file: file}
	covered, err := img.readSections(h)
	if err != nil {
		return nil, err
	}
	if err := img.readSignatures(h, covered); err != nil {
		return nil, err
	}
	return img, nil
}

// headers are the used fields of the headers.
type headers struct {
	checksum, security       uint64 // offsets of the fields
	table                    uint64 // offset of the section table
	count                    int
	size                     uint64 // SizeOfHeaders
	certificates, certLength uint64
}

func parseHeaders(file []byte) (headers, error) {
	var h headers
	le := binary.LittleEndian
	length := uint64(len(file))
	if length > MaxFile {
		return h, fmt.Errorf("%d bytes, more than %d", length, MaxFile)
	}
	if length < peOffsetAt+4 || !bytes.HasPrefix(file, []byte("MZ")) {
		return h, errNotPE
	}
	pe := uint64(le.Uint32(file[peOffsetAt:]))
	if pe+coffSize+240 > length || !bytes.HasPrefix(file[pe:], []byte("PE\x00\x00")) {
		return h, errNotPE
	}
	optional := pe + coffSize
	directories := optional + 112
	switch le.Uint16(file[optional:]) {
	case 0x20b: // PE32+
	case 0x10b:
		directories = optional + 96
	default:
		return h, errNotPE
	}
	optionalSize := uint64(le.Uint16(file[pe+20:]))
	h.checksum, h.security = optional+checksumAt, directories+8*securityEntry
	h.table, h.count = optional+optionalSize, int(le.Uint16(file[pe+6:]))
	h.size = uint64(le.Uint32(file[optional+headersSizeAt:]))
	switch {
	case le.Uint32(file[directories-4:]) <= securityEntry || h.security+8 > h.table:
		return h, errors.New("PE image without a place for signatures")
	case h.count == 0 || h.count > maxSections:
		return h, fmt.Errorf("%d sections, want 1 to %d", h.count, maxSections)
	case h.table+uint64(h.count)*sectionSize > h.size || h.size > length:
		return h, errors.New("PE headers do not fit")
	}
	h.certificates, h.certLength = uint64(le.Uint32(file[h.security:])), uint64(le.Uint32(file[h.security+4:]))
	return h, nil
}

// readSections reads the section table and returns how much of the file the
// headers and sections cover.
func (img *image) readSections(h headers) (covered uint64, err error) {
	f, le := img.file, binary.LittleEndian
	img.hashed = [][]byte{f[:h.checksum], f[h.checksum+4 : h.security], f[h.security+8 : h.size]}
	covered = h.size
	type raw struct{ at, size uint64 }
	var raws []raw
	for i := range h.count {
		b := f[h.table+uint64(i)*sectionSize:]
		virtual, start := uint64(le.Uint32(b[8:])), uint64(le.Uint32(b[12:]))
		size, at := uint64(le.Uint32(b[16:])), uint64(le.Uint32(b[20:]))
		if at+size > uint64(len(f)) {
			return 0, fmt.Errorf("section %d reaches beyond the end of the file", i)
		}
		s := section{name: string(bytes.TrimRight(b[:8], "\x00")), start: start, end: start + virtual, whole: virtual <= size}
		if size > 0 {
			raws = append(raws, raw{at, size})
			s.content = f[at : at+min(size, virtual)]
		}
		img.sections = append(img.sections, s)
	}
	slices.SortFunc(raws, func(a, b raw) int { return cmp.Compare(a.at, b.at) })
	for _, r := range raws {
		if r.at != covered {
			return 0, errors.New("sections overlap, or leave a gap in the file")
		}
		img.hashed = append(img.hashed, f[r.at:r.at+r.size])
		covered += r.size
	}
	return covered, nil
}

// readSignatures reads the certificate table. The digest also covers the bytes between the
// sections and the table.
func (img *image) readSignatures(h headers, covered uint64) error {
	f := img.file
	end := uint64(len(f))
	if h.certLength > 0 {
		if h.certificates < covered || h.certificates+h.certLength != end || h.certificates%8 != 0 {
			return errors.New("the signatures are not at the end of the file")
		}
		end = h.certificates
	} else if h.certificates != 0 {
		return errors.New("an empty table of signatures")
	}
	if covered < end {
		img.hashed = append(img.hashed, f[covered:end])
	}
	for table := f[end:]; len(table) > 0; {
		le := binary.LittleEndian
		if len(table) < 8 || len(img.signatures) == maxSignatures {
			return errors.New("malformed table of signatures")
		}
		length := uint64(le.Uint32(table))
		if length < 8 || length > uint64(len(table)) {
			return errors.New("malformed table of signatures")
		}
		// WIN_CERT_REVISION_2_0, WIN_CERT_TYPE_PKCS_SIGNED_DATA (UEFI 2.10, 32.2.4)
		if le.Uint16(table[4:]) == 0x0200 && le.Uint16(table[6:]) == 0x0002 {
			img.signatures = append(img.signatures, table[8:length])
		}
		table = table[min((length+7)&^7, uint64(len(table))):]
	}
	return nil
}

// section returns the section of that name, or nil if there is none.
func (img *image) section(name string) *section {
	for i := range img.sections {
		if img.sections[i].name == name {
			return &img.sections[i]
		}
	}
	return nil
}

// overlap reports whether two sections share memory. Loading such an image would corrupt it.
func (img *image) overlap() bool {
	s := slices.SortedFunc(slices.Values(img.sections), func(a, b section) int { return cmp.Compare(a.start, b.start) })
	for i := 1; i < len(s); i++ {
		if s[i].start < s[i-1].end {
			return true
		}
	}
	return false
}
