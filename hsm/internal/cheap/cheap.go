//go:build cgo && linux

// Package cheap measures the C heap for tests, because cgo can't be used in test files.
package cheap

// #include <malloc.h>
import "C"

// InUse returns the number of bytes that malloc has handed out in this process and that
// were not freed. The bytes that a thread caches for its next malloc count as well.
func InUse() int {
	m := C.mallinfo2()
	return int(m.uordblks) + int(m.hblkhd)
}
