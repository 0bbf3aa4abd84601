package sealtest

import (
	"bytes"
	"crypto/subtle"
	"fmt"
	"os"
	"strings"
	"testing"
	"unsafe"

	"github.com/beezy-dev/kleidi/seal"
)

// mask is exclusive-ored to the secrets, so that a Watch does not hold a copy of them.
const mask = 0xa5

// windowSize is the number of bytes that are searched at a time.
const windowSize = 1 << 20

// masks repeats mask.
var masks = bytes.Repeat([]byte{mask}, windowSize)

// Watch finds copies of secrets in the memory of this process, as a core file would
// show them.
type Watch struct {
	masked map[string][]byte
	places map[uintptr]int // addresses and sizes of the secrets themselves
}

// NewWatch returns a Watch without secrets.
func NewWatch() *Watch { return &Watch{masked: map[string][]byte{}, places: map[uintptr]int{}} }

// Add has Find find copies of s. It does not find s itself.
func (w *Watch) Add(name string, s *seal.Secret) {
	s.With(func(b []byte) {
		m := bytes.Clone(b)
		for i := range m {
			m[i] ^= mask
		}
		w.masked[name] = m
		w.places[uintptr(unsafe.Pointer(&b[0]))] = len(b)
	})
}

// Find returns, for each copy, the name of the secret and the mapping that holds the
// copy.
func (w *Watch) Find(t testing.TB) (found []string) {
	t.Helper()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open("/proc/self/mem")
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	pagemap, err := os.Open("/proc/self/pagemap")
	if err != nil {
		t.Fatal(err)
	}
	defer pagemap.Close()
	buf := make([]byte, windowSize)
	for line := range strings.Lines(string(maps)) {
		var from, to uintptr
		var perm string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &perm); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		if !strings.HasPrefix(perm, "rw") {
			continue
		}
		for ; from < to; from += uintptr(len(buf) / 2) { // windows overlap
			if !touched(pagemap, from, len(buf)) {
				continue // the race detector maps gigabytes that it does not use
			}
			n, _ := mem.ReadAt(buf[:min(uintptr(len(buf)), to-from)], int64(from)) // memfd_secret can't be read
			for _, name := range w.look(buf[:n], from) {
				found = append(found, name+" in "+strings.TrimSpace(line))
			}
		}
	}
	return found
}

// touched reports whether any page of the n bytes at address from is in memory or
// swapped out; see proc_pid_pagemap(5). If the page map can't be read, touched returns
// true.
func touched(pagemap *os.File, from uintptr, n int) bool {
	entries := make([]byte, n/os.Getpagesize()*8)
	read, err := pagemap.ReadAt(entries, int64(from)/int64(os.Getpagesize())*8)
	if err != nil || read < len(entries) {
		return true
	}
	for i := 7; i < len(entries); i += 8 {
		if entries[i]>>6 != 0 { // bits 63 (present) and 62 (swapped)
			return true
		}
	}
	return false
}

// look searches the bytes of window, which were read at address from, and erases them.
func (w *Watch) look(window []byte, from uintptr) (names []string) {
	defer clear(window)
	subtle.XORBytes(window, window, masks[:len(window)])
	for at, n := range w.places {
		if at >= from && at < from+uintptr(len(window)) {
			clear(window[at-from:][:min(n, len(window)-int(at-from))])
		}
	}
	for name, m := range w.masked {
		if bytes.Contains(window, m) {
			names = append(names, name)
		}
	}
	return names
}
