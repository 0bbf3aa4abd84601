package doctor

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/internal/doctor/diagnosis"
)

var update = flag.Bool("update", false, "write the tables of docs/doctor.md")

// TestDocumented: docs/doctor.md has a row for each kind of finding, with the reason that
// doctor gives and the command for the planted fault.
func TestDocumented(t *testing.T) {
	const begin, end = "<!-- findings -->\n", "<!-- end of findings -->"
	file := filepath.Join("..", "..", "docs", "doctor.md")
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, _ := strings.Cut(string(b), begin)
	_, after, ok := strings.Cut(rest, end)
	if !ok {
		t.Fatalf("%s has no %q", file, end)
	}
	table := "\n| finding | level | why it matters | the command, for example |\n|---|---|---|---|\n"
	for _, id := range slices.Sorted(maps.Keys(diagnosis.Kinds)) {
		at := slices.IndexFunc(faults, func(f fault) bool { return f.id == id })
		n := healthy(t)
		faults[at].plant(t, n)
		level := "PROBLEM"
		if diagnosis.Kinds[id].Note {
			level = "note"
		}
		command := strings.ReplaceAll(n.Examine().Findings[0].Command, "|", "\\|")
		table += fmt.Sprintf("| `%s` | %s | %s | `%s` |\n", id, level, diagnosis.Kinds[id].Why, command)
	}
	page := before + begin + table + "\n" + end + after
	if *update {
		err = os.WriteFile(file, []byte(page), 0o644)
	} else if page != string(b) {
		t.Errorf("%s differs from the code: go test ./internal/doctor -run TestDocumented -update", file)
	}
	if err != nil {
		t.Fatal(err)
	}
}
