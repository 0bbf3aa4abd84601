package etcdfile

import (
	"bytes"
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
	path := filepath.Join(t.TempDir(), "db")
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucket([]byte(bucket))
		for i := range pairs {
			if err == nil {
				err = b.Put(fmt.Appendf(nil, "key %06d", i), []byte(strings.Repeat("x", i%300)))
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

// TestNoDatabase: a file that is none, one that ends too early, and one without the bucket
// are told apart.
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
