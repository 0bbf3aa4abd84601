package disk

import (
	"archive/tar"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// File is a file in an archive, by its path. A path that ends in a slash is a folder.
type File struct {
	Name string
	Mode int64
	Data []byte
}

// Pack writes an archive. The same files give the same bytes.
func Pack(w io.Writer, files []File) error {
	t := tar.NewWriter(w)
	for _, f := range files {
		h := &tar.Header{Name: strings.TrimPrefix(f.Name, "/"), Mode: f.Mode, Size: int64(len(f.Data)), Format: tar.FormatPAX}
		if strings.HasSuffix(f.Name, "/") {
			h.Typeflag = tar.TypeDir
		}
		if err := t.WriteHeader(h); err != nil {
			return err
		}
		if _, err := t.Write(f.Data); err != nil {
			return err
		}
	}
	return t.Close()
}

// Read reads a whole archive, up to its end mark.
func Read(r io.Reader) ([]File, error) {
	var files []File
	for t := tar.NewReader(r); ; {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return files, nil
		}
		if err != nil {
			return nil, err
		}
		data, err := io.ReadAll(t)
		if err != nil {
			return nil, err
		}
		files = append(files, File{Name: h.Name, Mode: h.Mode, Data: data})
	}
}

// Unpack writes files below a folder.
func Unpack(files []File, dir string) error {
	for _, f := range files {
		path := filepath.Join(dir, f.Name)
		if strings.HasSuffix(f.Name, "/") {
			if err := os.MkdirAll(path, fs.FileMode(f.Mode)); err != nil {
				return err
			}
			continue
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, f.Data, fs.FileMode(f.Mode)); err != nil {
			return err
		}
	}
	return nil
}

// Collect reads a folder with the regular files in it, under their paths.
func Collect(dir string) ([]File, error) {
	files := []File{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() && path == dir {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		f := File{Name: path, Mode: int64(info.Mode().Perm())}
		switch {
		case d.IsDir():
			f.Name += "/"
		case info.Mode().IsRegular():
			if f.Data, err = os.ReadFile(path); err != nil {
				return err
			}
		default:
			return nil
		}
		files = append(files, f)
		return nil
	})
	slices.SortFunc(files, func(a, b File) int { return strings.Compare(a.Name, b.Name) })
	return files, err
}
