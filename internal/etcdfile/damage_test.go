package etcdfile

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/fnv"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.etcd.io/bbolt"
)

// sign gives a meta page the checksum of its content.
func sign(meta []byte) {
	sum := fnv.New64a()
	_, _ = sum.Write(meta[:metaSize-8])
	binary.LittleEndian.PutUint64(meta[metaSize-8:], sum.Sum64())
}

func count(file []byte) (n int, err error) {
	d, err := open(file)
	if err != nil {
		return 0, err
	}
	err = d.Each("key", func(_, _ []byte) error { n++; return nil })
	return n, err
}

// TestReadTwice: a database is read as often as one likes.
func TestReadTwice(t *testing.T) {
	d, err := open(write(t, "key", 5000))
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		n := 0
		if err := d.Each("key", func(_, _ []byte) error { n++; return nil }); err != nil || n != 5000 {
			t.Errorf("%d pairs, %v", n, err)
		}
	}
}

// TestForgedMeta: a meta page counts only where one belongs, and a number of pages that no
// file has is refused before memory is taken for them.
func TestForgedMeta(t *testing.T) {
	size := os.Getpagesize()
	elsewhere := write(t, "key", 100)
	stray := elsewhere[2*size:]
	copy(stray[:pageHeaderSize+metaSize], elsewhere[size:])
	meta := stray[pageHeaderSize:]
	binary.LittleEndian.PutUint64(meta[16:], 1)    // the root
	binary.LittleEndian.PutUint64(meta[48:], 1000) // the transaction
	sign(meta)
	if n, err := count(elsewhere); n != 100 || err != nil {
		t.Errorf("with a meta page elsewhere: %d pairs, %v", n, err)
	}

	huge := write(t, "key", 100)
	for page := range 2 {
		meta := huge[page*size+pageHeaderSize:]
		binary.LittleEndian.PutUint64(meta[40:], 1<<62)
		sign(meta)
	}
	if _, err := open(huge); !errors.Is(err, ErrShort) {
		t.Errorf("with too many pages: %v", err)
	}
}

// TestForgedTree: what is no bucket of pairs is refused, and so is a page without elements,
// which would hide what lies below it.
func TestForgedTree(t *testing.T) {
	element := func(page []byte, i int) []byte { return page[pageHeaderSize+i*elementSize:] }
	for name, row := range map[string]struct {
		pairs, elements int
		kind            uint16
		change          func(page []byte)
		want            string
	}{
		"a pair with the bucket's name": {1, 1, leafPage, func(page []byte) { binary.LittleEndian.PutUint32(element(page, 0), 0) }, "no bucket of this name"},
		"a branch within a bucket": {1, 1, leafPage, func(page []byte) {
			e := element(page, 0)
			inner := e[binary.LittleEndian.Uint32(e[4:])+binary.LittleEndian.Uint32(e[8:])+bucketSize:]
			binary.LittleEndian.PutUint16(inner[8:], branchPage)
		}, "the leaf within a bucket is damaged"},
		"an empty branch":   {5000, 3, branchPage, func(page []byte) { binary.LittleEndian.PutUint16(page[10:], 0) }, "elements don't fit"},
		"a meta page below": {5000, 3, branchPage, func(page []byte) { binary.LittleEndian.PutUint64(element(page, 0)[8:], 1) }, "page 1 does not exist"},
	} {
		file := write(t, "key", row.pairs)
		forge(t, file, row.kind, uint16(row.elements), 0, row.change)
		if n, err := count(file); err == nil || !strings.Contains(err.Error(), row.want) {
			t.Errorf("%s: %d pairs, %v", name, n, err)
		}
	}
}

// TestBucketWithinBucket: etcd makes none, and its pairs would be left out.
func TestBucketWithinBucket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "db")
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		outer, err := tx.CreateBucket([]byte("key"))
		if err == nil {
			_, err = outer.CreateBucket([]byte("inner"))
		}
		return err
	})
	file, readErr := os.ReadFile(path)
	if err := errors.Join(err, db.Close(), readErr); err != nil {
		t.Fatal(err)
	}
	if _, err := count(file); err == nil || !strings.Contains(err.Error(), "a bucket stands within a bucket") {
		t.Error(err)
	}
}

// TestLastOverflow: a page may not lie within another one, in its last page neither.
func TestLastOverflow(t *testing.T) {
	file := writeValues(t, "key", 100, func(int) string { return strings.Repeat("x", 10_000) })
	var last uint64
	outer := forge(t, file, leafPage, 1, 2, func(page []byte) {
		overflow := binary.LittleEndian.Uint32(page[12:])
		last = binary.LittleEndian.Uint64(page) + uint64(overflow)
		inner := page[int(overflow)*os.Getpagesize():]
		clear(inner[:pageHeaderSize])
		binary.LittleEndian.PutUint64(inner, last)
		binary.LittleEndian.PutUint16(inner[8:], leafPage)
	})
	forge(t, file, branchPage, 3, 0, func(page []byte) {
		n := int(binary.LittleEndian.Uint16(page[10:]))
		for i := range n {
			if e := page[pageHeaderSize+i*elementSize+8:]; binary.LittleEndian.Uint64(e) == outer && i == n-1 {
				t.Fatal("the outer page is the last one")
			}
		}
		binary.LittleEndian.PutUint64(page[pageHeaderSize+(n-1)*elementSize+8:], last)
	})
	if _, err := count(bytes.Clone(file)); err == nil || !strings.Contains(err.Error(), "two places") {
		t.Error(err)
	}
}
