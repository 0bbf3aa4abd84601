package carry

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/beezy-dev/kleidi/seal/keyring"
)

// MaxFile bounds a file, in bytes.
const MaxFile = 4*(keyring.MaxSize+keyring.MaxRecordSize)/3 + 1024

const fileFormat = 1

// File is the file that a node exports. An attacker may have chosen everything in it.
type File struct {
	Format  int    `json:"kleidiExport"`
	Keyring []byte `json:"keyring"` // the shared keyring
	Record  []byte `json:"record"`  // of the node that wrote the file
}

// Marshal returns the file in its stored form.
func (f File) Marshal() ([]byte, error) {
	f.Format = fileFormat
	b, err := json.Marshal(f)
	return append(b, '\n'), err
}

// ParseFile reads a result of Marshal.
func ParseFile(b []byte) (f File, err error) {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&f); err != nil || f.Format == 0 {
		return f, errors.New("this is not a file that kleidi keyring export wrote; for a backup, run kleidi keyring restore FILE")
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return f, errors.New("something follows the end of the export")
	}
	if f.Format != fileFormat {
		return f, fmt.Errorf("the export is of format %d, and this version reads format %d; install the version that wrote it, or a later one", f.Format, fileFormat)
	}
	return f, nil
}
