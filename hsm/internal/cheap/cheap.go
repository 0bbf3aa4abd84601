//go:build cgo && linux

// Package cheap counts the C heap, for tests: cgo can't be used in their files.
package cheap

// #include <malloc.h>
import "C"

// InUse returns how many bytes malloc has handed out in this process and not got
// back. What a thread keeps at hand for its next malloc counts as well.
func InUse() int {
	m := C.mallinfo2()
	return int(m.uordblks) + int(m.hblkhd)
}
