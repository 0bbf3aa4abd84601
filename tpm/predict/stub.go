package predict

import (
	"bytes"
	"regexp"
	"slices"
	"strconv"
)

// stub describes the measurements of one version of systemd-stub.
type stub struct {
	version string
	// sections are measured into PCR 11, each by its name and its content, in this
	// order, if the image has them.
	sections []string
	// initrds are the parts that the stub concatenates for the kernel; nil if unknown.
	initrds []initrdPart
}

// initrdPart is a section that reaches the kernel in its initrd, verbatim or as a file.
type initrdPart struct {
	section string
	file    string // in /.extra; "" for an initrd
}

// canonical is the order in which every version measures sections (systemd,
// src/fundamental/uki.h: "do not reorder"). A version leaves out the sections that it does
// not know.
var canonical = []string{".linux", ".osrel", ".cmdline", ".initrd", ".ucode", ".splash", ".dtb", ".uname", ".sbat", ".pcrpkey", ".hwids"}

// undecided are sections among which the stub chooses by the machine or by its arguments.
var undecided = []string{".profile", ".dtbauto", ".efifw"}

// stubs are the versions whose source was read: src/boot/efi/stub.c and
// src/fundamental/tpm-pcr.c of 252.39, src/boot/stub.c and src/fundamental/uki.c
// of 257.13. The behaviour of other versions must be learned from a running boot.
var stubs = map[int]stub{
	252: {
		sections: []string{".linux", ".osrel", ".cmdline", ".initrd", ".splash", ".dtb", ".pcrpkey"},
		initrds: []initrdPart{
			{".initrd", ""}, {".pcrsig", "tpm2-pcr-signature.json"}, {".pcrpkey", "tpm2-pcr-public-key.pem"},
		},
	},
	257: {
		sections: canonical,
		initrds: []initrdPart{
			{".ucode", ""}, {".initrd", ""}, {".pcrsig", "tpm2-pcr-signature.json"},
			{".pcrpkey", "tpm2-pcr-public-key.pem"}, {".osrel", "os-release"},
		},
	},
}

var stubMagic = regexp.MustCompile(`^#### LoaderInfo: systemd-stub (v?([0-9]{3})[^ #]{0,64}) ####`)

// stubVersion returns the version of the image's systemd-stub, and the version's first number.
func stubVersion(img *image) (version string, major int) {
	magic := img.section(".sdmagic")
	if magic == nil {
		return "", 0
	}
	m := stubMagic.FindSubmatch(magic.content)
	if m == nil {
		return "", 0
	}
	major, _ = strconv.Atoi(string(m[2]))
	return string(m[1]), major
}

// stubOf returns the description of the image's stub. It learns an unknown version from the
// running boot, if that boot has the very same version and its image is given: the stub will
// measure the same sections again.
func stubOf(img, running *image, measured []string) (stub, error) {
	version, major := stubVersion(img)
	if version == "" {
		return stub{}, badFile("the image has no systemd-stub (no version in a section .sdmagic)")
	}
	s, ok := stubs[major]
	s.version = version
	if ok {
		return s, nil
	}
	if running != nil {
		if v, _ := stubVersion(running); v == version {
			s.sections = measured
			return s, s.learn(img, running)
		}
	}
	return stub{}, refuse(11, "it is not known what systemd-stub %s measures", version)
}

// learn refuses an image with sections that the running image does not have.
func (s stub) learn(img, running *image) error {
	for _, name := range canonical {
		if img.section(name) != nil && running.section(name) == nil {
			return refuse(11, "it is not known whether systemd-stub %s measures the section %s", s.version, name)
		}
	}
	return nil
}

// payload checks that the stub will find the same sections as this package.
func payload(img *image) error {
	names := slices.Concat(canonical, []string{".pcrsig"}, undecided)
	seen := map[string]bool{}
	for _, s := range img.sections {
		known := slices.Contains(names, s.name)
		switch {
		case slices.Contains(undecided, s.name):
			return refuse(11, "the image has a section %s; what is measured depends on the machine or on the boot entry", s.name)
		case known && seen[s.name]:
			return refuse(11, "the image has two sections %s", s.name)
		case known && !s.whole:
			return badFile("the section %s is larger in memory than in the file", s.name)
		case !known && slices.ContainsFunc(names, func(n string) bool { return len(s.name) > len(n) && s.name[:len(n)] == n }):
			// 252 compares only as many bytes as its own name has.
			return refuse(11, "the section %s may be taken for another", s.name)
		}
		seen[s.name] = true
	}
	if linux := img.section(".linux"); linux == nil || len(linux.content) == 0 {
		return badFile("not a unified kernel image: it has no section .linux")
	}
	if img.overlap() {
		return badFile("its sections overlap in memory, so that it cannot start; build the image again with sections that do not overlap")
	}
	return nil
}

// initrd returns the parts of the initrd that the kernel receives, or none.
func (s stub) initrd(img *image) [][]byte {
	var parts [][]byte
	for _, p := range s.initrds {
		sec := img.section(p.section)
		switch {
		case sec == nil || len(sec.content) == 0:
		case p.file == "":
			parts = append(parts, sec.content)
		default:
			parts = append(parts, cpio(p.file, sec.content))
		}
	}
	if len(parts) < 2 { // the stub hands a single part over verbatim
		return parts
	}
	var padded [][]byte
	for _, p := range parts {
		padded = append(padded, p, make([]byte, -len(p)&3))
	}
	return padded
}

func (img *image) content(name string) []byte {
	if s := img.section(name); s != nil {
		return s.content
	}
	return nil
}

// commandLine returns the command line that the stub takes from its image and hands to the
// kernel; ok is false if that is not certain. Both known versions turn control characters
// into spaces and drop trailing spaces. They treat leading spaces and non-ASCII characters
// differently.
func commandLine(section []byte) (line string, ok bool) {
	if i := bytes.IndexByte(section, 0); i >= 0 {
		section = section[:i]
	}
	line = string(bytes.TrimRight(bytes.Map(func(r rune) rune {
		if r < ' ' {
			return ' '
		}
		return r
	}, section), " "))
	ok = line != "" && line[0] != ' '
	for _, c := range []byte(line) {
		ok = ok && c < 0x7f
	}
	return line, ok
}
