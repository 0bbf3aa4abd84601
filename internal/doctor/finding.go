package doctor

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/beezy-dev/kleidi/internal/files"
)

// Finding is the result of a check that found a fault.
type Finding struct {
	Check string `json:"check"`
	// ID names the kind of finding; docs/doctor.md has a row for each.
	ID string `json:"id"`
	// Note says that the finding can wait, and does not change the exit code.
	Note bool   `json:"note,omitempty"`
	What string `json:"what"`
	Why  string `json:"why"`
	// Command repairs the fault, or begins to.
	Command string `json:"command"`

	unchecked bool // What is the reason why the check was not made
}

// found is one finding of a kind.
func found(id, command, format string, args ...any) []Finding {
	k, ok := kinds[id]
	if !ok {
		panic("doctor: no kind " + id)
	}
	return []Finding{{ID: id, Note: k.note, What: fmt.Sprintf(format, args...), Why: k.why, Command: command}}
}

// notChecked says that a check was not made, and why.
func notChecked(format string, args ...any) []Finding {
	return []Finding{{unchecked: true, What: fmt.Sprintf(format, args...)}}
}

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
