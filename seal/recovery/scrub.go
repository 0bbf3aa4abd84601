package recovery

import "io"

// scrubReader feeds age its file and afterwards overwrites the buffer that age
// read it into: age decrypts in place, and the KEK would stay there. It hands
// out a byte at a time, since age reads the header through a buffer of its own,
// from which it would copy what lies beyond the header.
type scrubReader struct {
	rest    []byte
	largest []byte // of the buffers that Read was given
}

func (r *scrubReader) Read(p []byte) (int, error) {
	if len(p) > len(r.largest) {
		r.largest = p
	}
	if len(r.rest) == 0 {
		return 0, io.EOF
	}
	n := copy(p[:min(1, len(p))], r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

func (r *scrubReader) scrub() { clear(r.largest) }
