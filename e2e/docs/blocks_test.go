package docs

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// documents are the documents with commands, relative to this folder.
var documents = []string{"../../README.md", "../../docs/recovery.md", "../../docs/operations.md", "../../docs/boot-states.md",
	"../../docs/boot-policy.md", "../../docs/updates.md", "../../docs/remote-attestation.md", "../../docs/pkcs11.md",
	"../../docs/high-availability.md", "../../docs/rotation.md"}

// block is a fenced block of a document, with the comment before it.
type block struct {
	line     int // the line of its first fence
	commands bool
	comment  string
	exit     string // the exit code in the comment, if it is not 0
	text     string
}

var comment = regexp.MustCompile(`^<!-- (.*) -->$`)

// blocks returns the blocks of commands, and every other block with a comment.
func blocks(t *testing.T, file string) []block {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var all []block
	var open *block
	said := ""
	for i, line := range strings.Split(string(b), "\n") {
		fence, isFence := strings.CutPrefix(strings.TrimSpace(line), "```")
		switch {
		case open != nil && isFence:
			if open.commands || open.comment != "" {
				all = append(all, *open)
			}
			open = nil
		case open != nil:
			open.text += line + "\n"
		case isFence:
			open = &block{line: i + 1, commands: fence == "sh" || fence == "console" || fence == "shell" || fence == "bash", comment: said}
			said = ""
		case strings.TrimSpace(line) != "":
			said = ""
			if m := comment.FindStringSubmatch(strings.TrimSpace(line)); m != nil {
				said = m[1]
			}
		}
	}
	if open != nil {
		t.Fatalf("%s:%d: the block does not end", file, open.line)
	}
	return all
}

// matcher turns a line of a document into a pattern that the output must match: … stands
// for anything.
func matcher(line string) *regexp.Regexp {
	parts := strings.Split(strings.TrimSpace(line), "…")
	for i, p := range parts {
		fields := strings.Fields(p)
		for j, f := range fields {
			fields[j] = regexp.QuoteMeta(f)
		}
		parts[i] = strings.Join(fields, ` +`)
	}
	return regexp.MustCompile(`(?m)^ *` + strings.Join(parts, ` *.*`) + ` *$`)
}
