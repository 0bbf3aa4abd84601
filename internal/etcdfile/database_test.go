package etcdfile

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.etcd.io/bbolt"
)

// write returns the file of a database with the pairs of a bucket, as bbolt writes it.
func write(t *testing.T, bucket string, pairs int) []byte {
	t.Helper()
	return writeValues(t, bucket, pairs, func(i int) string { return strings.Repeat("x", i%300) })
}

// writeValues is write with the values of a function.
func writeValues(t *testing.T, bucket string, pairs int, value func(int) string) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "db")
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucket([]byte(bucket))
		for i := range pairs {
			if err == nil {
				err = b.Put(fmt.Appendf(nil, "key %06d", i), []byte(value(i)))
			}
		}
		return err
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func open(b []byte) (*Database, error) { return Open(bytes.NewReader(b), int64(len(b))) }

// TestEach: every pair of a bucket is read, in order, in a small bucket and in a tree.
func TestEach(t *testing.T) {
	for _, pairs := range []int{0, 1, 3, 5000} {
		d, err := open(write(t, "key", pairs))
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		err = d.Each("key", func(key, value []byte) error {
			if string(key) != fmt.Sprintf("key %06d", n) || len(value) != n%300 {
				t.Errorf("pair %d: %q, %d bytes", n, key, len(value))
			}
			n++
			return nil
		})
		if err != nil || n != pairs {
			t.Errorf("%d pairs of %d, %v", n, pairs, err)
		}
	}
}

// TestNoDatabase: a file that is not a database, a truncated one, and one without the
// bucket have different errors.
func TestNoDatabase(t *testing.T) {
	whole := write(t, "key", 5000)
	for name, row := range map[string]struct {
		file []byte
		want error
	}{
		"nothing": {nil, ErrNotDatabase}, "zeros": {make([]byte, 1<<16), ErrNotDatabase}, "cut off": {whole[:len(whole)/2], ErrShort},
	} {
		if _, err := open(row.file); !errors.Is(err, row.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	d, err := open(whole)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Each("another", func(_, _ []byte) error { return nil }); !errors.Is(err, ErrNoBucket) {
		t.Error(err)
	}
	d, err = open(whole)
	if err != nil {
		t.Fatal(err)
	}
	enough := errors.New("enough")
	if err := d.Each("key", func(_, _ []byte) error { return enough }); !errors.Is(err, enough) {
		t.Error(err)
	}
}

// forge changes the first page of a kind that has so many elements or overflow pages at
// least, and returns its number.
func forge(t *testing.T, file []byte, kind uint16, elements uint16, overflow uint32, change func(page []byte)) uint64 {
	t.Helper()
	size := os.Getpagesize() // bbolt's default
	for at := 2 * size; at < len(file); at += size {
		page := file[at:]
		if binary.LittleEndian.Uint64(page) == uint64(at/size) && binary.LittleEndian.Uint16(page[8:]) == kind &&
			binary.LittleEndian.Uint16(page[10:]) >= elements && binary.LittleEndian.Uint32(page[12:]) >= overflow {
			change(page)
			return uint64(at / size)
		}
	}
	t.Fatal("no such page")
	return 0
}

// TestForgedPages: a meta page counts only with its checksum, and the later one of two; a page
// must be the one that it claims to be.
func TestForgedPages(t *testing.T) {
	each := func(file []byte) error {
		d, err := open(file)
		if err != nil {
			return err
		}
		return d.Each("key", func(_, _ []byte) error { return nil })
	}
	meta := func(file []byte, page int) []byte { return file[page*os.Getpagesize()+pageHeaderSize:] }
	whole := write(t, "key", 5000)
	newest := 0
	if binary.LittleEndian.Uint64(meta(whole, 1)[48:]) > binary.LittleEndian.Uint64(meta(whole, 0)[48:]) {
		newest = 1
	}
	older := bytes.Clone(whole)
	meta(older, newest)[16] ^= 1 // the root, so that its checksum is wrong
	if err := each(older); !errors.Is(err, ErrNoBucket) {
		t.Errorf("with the older meta page, from before the bucket: %v", err)
	}
	neither := bytes.Clone(older)
	meta(neither, 1-newest)[16] ^= 1
	if err := each(neither); !errors.Is(err, ErrNotDatabase) {
		t.Errorf("with neither meta page: %v", err)
	}
	another := bytes.Clone(whole)
	forge(t, another, leafPage, 10, 0, func(page []byte) { page[0] ^= 1 })
	if err := each(another); err == nil || !strings.Contains(err.Error(), "claims to be page") {
		t.Errorf("a page with another number: %v", err)
	}
	long := bytes.Clone(whole)
	forge(t, long, leafPage, 10, 0, func(page []byte) { binary.LittleEndian.PutUint32(page[12:], 5000) })
	if err := each(long); err == nil || !strings.Contains(err.Error(), "too many") {
		t.Errorf("a page that ends after the file: %v", err)
	}
}

// TestNothingTwice: elements that share their bytes, and a page within another page, are
// refused: otherwise a small file could make a reader work for hours.
func TestNothingTwice(t *testing.T) {
	each := func(file []byte) error {
		d, err := open(file)
		if err != nil {
			return err
		}
		return d.Each("key", func(_, _ []byte) error { return nil })
	}
	shared := write(t, "key", 5000)
	forge(t, shared, leafPage, 10, 0, func(page []byte) {
		for at := pageHeaderSize; at < pageHeaderSize+10*elementSize; at += elementSize {
			binary.LittleEndian.PutUint32(page[at+4:], uint32(os.Getpagesize()-at-2000))
			binary.LittleEndian.PutUint32(page[at+12:], 1000)
		}
	})
	if err := each(shared); err == nil || !strings.Contains(err.Error(), "doesn't fit") {
		t.Errorf("shared bytes: %v", err)
	}

	within := writeValues(t, "key", 100, func(int) string { return strings.Repeat("x", 10_000) })
	outer := forge(t, within, leafPage, 1, 2, func(page []byte) {
		inner := page[os.Getpagesize():]
		clear(inner[:pageHeaderSize])
		binary.LittleEndian.PutUint64(inner, binary.LittleEndian.Uint64(page)+1)
		binary.LittleEndian.PutUint16(inner[8:], leafPage)
	})
	forge(t, within, branchPage, 3, 0, func(page []byte) {
		last := page[pageHeaderSize+(int(binary.LittleEndian.Uint16(page[10:]))-1)*elementSize:]
		binary.LittleEndian.PutUint64(last[8:], outer+1)
	})
	if err := each(within); err == nil || !strings.Contains(err.Error(), "two places") {
		t.Errorf("a page within a page: %v", err)
	}
}
