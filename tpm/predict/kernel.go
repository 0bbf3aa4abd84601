package predict

import (
	"bytes"
	"encoding/binary"
	"regexp"
	"strconv"
)

// kernelVersion returns the version in the header of an x86 kernel image (Linux,
// Documentation/arch/x86/boot.rst: kernel_version), or 0.0.
func kernelVersion(bzImage []byte) (major, minor int) {
	const header, field = 0x202, 0x20e
	if len(bzImage) < field+2 || !bytes.Equal(bzImage[header:header+4], []byte("HdrS")) {
		return 0, 0
	}
	at := int(binary.LittleEndian.Uint16(bzImage[field:])) + 0x200
	if at > len(bzImage) {
		return 0, 0
	}
	m := kernelRelease.FindSubmatch(bzImage[at:min(at+32, len(bzImage))])
	if m == nil {
		return 0, 0
	}
	major, _ = strconv.Atoi(string(m[1]))
	minor, _ = strconv.Atoi(string(m[2]))
	return major, minor
}

var kernelRelease = regexp.MustCompile(`^([0-9]{1,2})\.([0-9]{1,3})[^0-9]`)

// measuresLoad reports whether the kernel's EFI stub is known to measure its load options and
// its initrd into PCR 9. Linux 6.1 and later do.
func measuresLoad(kernel []byte) bool {
	major, minor := kernelVersion(kernel)
	return major > 6 || major == 6 && minor >= 1
}
