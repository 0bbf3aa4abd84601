package predict

import "fmt"

// cpioTrailer ends an archive. systemd writes only the length of its name in capitals.
const cpioTrailer = "070701" + "00000000" + "00000000" + "00000000" + "00000000" + "00000001" + "00000000" + "00000000" +
	"00000000" + "00000000" + "00000000" + "00000000" + "0000000B" + "00000000" + "TRAILER!!!\x00\x00\x00\x00"

// cpio returns the archive in which systemd-stub hands a section to the kernel as
// /.extra/NAME (systemd, pack_cpio_literal in src/boot/cpio.c, the same in 252 and
// 257): the folder, the file and the trailer, without owners and times.
func cpio(name string, content []byte) []byte {
	b := cpioEntry(nil, 1, 0o40555, ".extra", nil)
	b = cpioEntry(b, 2, 0o100444, ".extra/"+name, content)
	return append(b, cpioTrailer...)
}

// cpioEntry appends one entry of the "newc" format.
func cpioEntry(b []byte, inode, mode uint32, name string, content []byte) []byte {
	b = fmt.Appendf(b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(name)+1, 0, name)
	b = append(b, make([]byte, -len(b)&3)...)
	b = append(b, content...)
	return append(b, make([]byte, -len(b)&3)...)
}
