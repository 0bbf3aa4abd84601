// Package etcdfile reads the file of etcd's database, which is bbolt's format. Nothing
// in the file is trusted. bbolt itself panics on a damaged file, or loops. The tests
// compare this package with bbolt.
package etcdfile

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
)

// The format, see go.etcd.io/bbolt internal/common: a database is a file of pages. The
// first two are meta pages; the one with the higher transaction is in force. Buckets are
// trees of pages, and the root bucket holds the others.

// Sizes in bytes.
const (
	pageHeaderSize = 16 // id 8, flags 2, count 2, overflow 4
	elementSize    = 16
	metaSize       = 64
	bucketSize     = 16 // root 8, sequence 8
	minPageSize    = 1 << 10
	maxPageSize    = 64 << 10
)

// Flags of a page.
const (
	branchPage = 0x01
	leafPage   = 0x02
	metaPage   = 0x04
)

// bucketLeaf is the flag of a leaf's element that is a bucket.
const bucketLeaf = 0x01

const (
	metaMagic   = 0xED0CDAED
	metaVersion = 2
)

// maxDepth bounds the depth of a tree. One page holds at least two elements, so this is
// enough for every file.
const maxDepth = 64

// maxOverflow bounds the size of one page with its overflow, in bytes. etcd's values
// have at most a few MiB.
const maxOverflow = 64 << 20

// The errors for faults other than damage.
var (
	ErrNotDatabase = errors.New("this is not a database of etcd")
	ErrNoBucket    = errors.New("it has no bucket of this name")
	// ErrShort: the file is shorter than its pages.
	ErrShort = errors.New("the file is shorter than its database")
)

// Database is an open file. It is not safe for concurrent use.
type Database struct {
	r        io.ReaderAt
	pageSize int64
	root     uint64 // page of the root bucket
	pages    uint64 // the number of pages
	buffers  [maxDepth][]byte
	seen     []uint64 // bits: a page belongs to one place of one tree only
}

// Open reads the meta pages of a file. size is its size in bytes, without the checksum
// after the pages.
func Open(r io.ReaderAt, size int64) (*Database, error) {
	d := &Database{r: r}
	var newest uint64
	// The second meta page is found by its own page size if the first one is damaged.
	for at := int64(0); at <= maxPageSize; at = max(minPageSize, 2*at) {
		var b [pageHeaderSize + metaSize]byte
		if _, err := r.ReadAt(b[:], at); err != nil {
			break
		}
		m, ok := parseMeta(b[:])
		if !ok || at != 0 && m.pageSize != at || d.pageSize != 0 && (m.pageSize != d.pageSize || m.transaction <= newest) {
			continue
		}
		d.pageSize, d.root, d.pages, newest = m.pageSize, m.root, m.pages, m.transaction
	}
	switch {
	case d.pageSize == 0:
		return nil, ErrNotDatabase
	case d.pages > 1<<40 || int64(d.pages)*d.pageSize > size:
		return nil, fmt.Errorf("%w: it has %d bytes for %d pages", ErrShort, size, d.pages)
	}
	d.seen = make([]uint64, d.pages/64+1)
	return d, nil
}

type meta struct {
	pageSize                 int64
	root, pages, transaction uint64
}

func parseMeta(b []byte) (m meta, ok bool) {
	flags := binary.LittleEndian.Uint16(b[8:])
	b = b[pageHeaderSize:]
	sum := fnv.New64a()
	_, _ = sum.Write(b[:metaSize-8])
	m = meta{
		pageSize: int64(binary.LittleEndian.Uint32(b[8:])), root: binary.LittleEndian.Uint64(b[16:]),
		pages: binary.LittleEndian.Uint64(b[40:]), transaction: binary.LittleEndian.Uint64(b[48:]),
	}
	return m, flags&metaPage != 0 && binary.LittleEndian.Uint32(b) == metaMagic && binary.LittleEndian.Uint32(b[4:]) == metaVersion &&
		binary.LittleEndian.Uint64(b[metaSize-8:]) == sum.Sum64() &&
		m.pageSize >= minPageSize && m.pageSize <= maxPageSize && m.pageSize&(m.pageSize-1) == 0
}

// Each calls f with every pair of a bucket, in the order of the keys. The slices are
// valid only until f returns.
func (d *Database) Each(bucket string, f func(key, value []byte) error) error {
	clear(d.seen)
	var found []byte
	err := d.walk(d.root, 0, func(key, value []byte, isBucket bool) error {
		if isBucket && string(key) == bucket {
			found = bytes.Clone(value)
		}
		return nil
	})
	if err != nil {
		return err
	}
	if found == nil {
		return fmt.Errorf("%w: %s", ErrNoBucket, bucket)
	}
	if len(found) < bucketSize {
		return errors.New("a bucket is too short")
	}
	pair := func(key, value []byte, isBucket bool) error {
		if isBucket {
			return errors.New("a bucket stands within a bucket")
		}
		return f(key, value)
	}
	if root := binary.LittleEndian.Uint64(found); root != 0 {
		return d.walk(root, 0, pair)
	}
	// A small bucket is a leaf within the root's.
	page := found[bucketSize:]
	if len(page) < pageHeaderSize || binary.LittleEndian.Uint16(page[8:]) != leafPage {
		return errors.New("the leaf within a bucket is damaged")
	}
	return leaf(page, pair)
}

// walk calls f with every pair below a page.
func (d *Database) walk(id uint64, depth int, f func(key, value []byte, isBucket bool) error) error {
	page, err := d.page(id, depth)
	if err != nil {
		return err
	}
	if binary.LittleEndian.Uint16(page[8:]) == leafPage {
		return leaf(page, f)
	}
	count := int(binary.LittleEndian.Uint16(page[10:]))
	if count == 0 || pageHeaderSize+count*elementSize > len(page) {
		return fmt.Errorf("page %d: %d elements don't fit", id, count)
	}
	for i := range count {
		// walk uses another buffer for each depth, so page keeps its content
		if err := d.walk(binary.LittleEndian.Uint64(page[pageHeaderSize+i*elementSize+8:]), depth+1, f); err != nil {
			return err
		}
	}
	return nil
}

// leaf calls f with every pair of a leaf.
func leaf(page []byte, f func(key, value []byte, isBucket bool) error) error {
	id, count := binary.LittleEndian.Uint64(page), int(binary.LittleEndian.Uint16(page[10:]))
	if pageHeaderSize+count*elementSize > len(page) {
		return fmt.Errorf("page %d: %d elements don't fit", id, count)
	}
	room := uint64(len(page) - pageHeaderSize - count*elementSize)
	for i := range count {
		at := pageHeaderSize + i*elementSize
		flags, pos := binary.LittleEndian.Uint32(page[at:]), binary.LittleEndian.Uint32(page[at+4:])
		keySize, valueSize := binary.LittleEndian.Uint32(page[at+8:]), binary.LittleEndian.Uint32(page[at+12:])
		start := uint64(at) + uint64(pos)
		end := start + uint64(keySize) + uint64(valueSize)
		// Elements that share their bytes would let a small file hold any amount of work.
		if end > uint64(len(page)) || uint64(keySize)+uint64(valueSize) > room {
			return fmt.Errorf("page %d: element %d doesn't fit", id, i)
		}
		room -= uint64(keySize) + uint64(valueSize)
		if err := f(page[start:start+uint64(keySize)], page[start+uint64(keySize):end], flags&bucketLeaf != 0); err != nil {
			return err
		}
	}
	return nil
}

// page reads a branch or a leaf with its overflow. Each page is read once, so that a walk
// ends, and its memory is bounded by the size of the file.
func (d *Database) page(id uint64, depth int) ([]byte, error) {
	switch {
	case depth == maxDepth:
		return nil, errors.New("the tree of pages is too deep")
	case id < 2 || id >= d.pages:
		return nil, fmt.Errorf("page %d does not exist", id)
	}
	if err := d.mark(id); err != nil {
		return nil, err
	}
	b, err := d.read(id, depth, d.pageSize)
	if err != nil {
		return nil, err
	}
	flags, overflow := binary.LittleEndian.Uint16(b[8:]), uint64(binary.LittleEndian.Uint32(b[12:]))
	switch size := int64(overflow+1) * d.pageSize; {
	case binary.LittleEndian.Uint64(b) != id:
		return nil, fmt.Errorf("page %d claims to be page %d", id, binary.LittleEndian.Uint64(b))
	case flags != branchPage && flags != leafPage:
		return nil, fmt.Errorf("page %d has flags %#x", id, flags)
	case overflow >= d.pages-id || size > maxOverflow:
		return nil, fmt.Errorf("page %d has %d more pages, too many", id, overflow)
	}
	for next := id + 1; next <= id+overflow; next++ {
		if err := d.mark(next); err != nil {
			return nil, err
		}
	}
	if overflow > 0 {
		return d.read(id, depth, int64(overflow+1)*d.pageSize)
	}
	return b, nil
}

// mark notes that a page is in use. It refuses a page that was in use before.
func (d *Database) mark(id uint64) error {
	if d.seen[id/64]>>(id%64)&1 != 0 {
		return fmt.Errorf("page %d belongs to two places", id)
	}
	d.seen[id/64] |= 1 << (id % 64)
	return nil
}

func (d *Database) read(id uint64, depth int, size int64) ([]byte, error) {
	if int64(cap(d.buffers[depth])) < size {
		d.buffers[depth] = make([]byte, size)
	}
	b := d.buffers[depth][:size]
	if _, err := d.r.ReadAt(b, int64(id)*d.pageSize); err != nil {
		return nil, fmt.Errorf("page %d: %w", id, err)
	}
	return b, nil
}
