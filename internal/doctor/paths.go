package doctor

import (
	"os"
	"path/filepath"
	"strings"

	"github.com/beezy-dev/kleidi/internal/files"
)

func (n *Node) path(file string) string { return filepath.Join(n.Root, file) }

// exists reports whether the file exists, or can't be examined.
func (n *Node) exists(file string) bool {
	_, err := os.Stat(n.path(file))
	return !os.IsNotExist(err)
}

// maxFile bounds the files that checks read, in bytes.
const maxFile = 1 << 20

func (n *Node) read(file string) ([]byte, error) { return files.Read(n.path(file), maxFile) }

// line returns a short file of the kernel in one line, or "".
func (n *Node) line(file string) string {
	b, _ := n.read(file)
	return strings.TrimSpace(string(b))
}
