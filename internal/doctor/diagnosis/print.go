package diagnosis

import (
	"fmt"
	"io"

	"github.com/beezy-dev/kleidi/seal"
)

// Print shows the report to a person.
func (r Report) Print(w io.Writer) {
	notes := 0
	for _, f := range r.Findings {
		level := "PROBLEM"
		if f.Note {
			level = "note"
			notes++
		}
		fmt.Fprintf(w, "%-8s %s: %s\n         why: %s\n         -> %s\n", level, f.ID, f.What, f.Why, f.Command)
	}
	for _, u := range r.Unmade() {
		fmt.Fprintf(w, "%-8s %s: not checked: %s\n", "-", u.Check, u.Reason)
	}
	fmt.Fprintf(w, "%s, %s", seal.Count(len(r.Checks), "check"), seal.Count(len(r.Findings), "finding"))
	if notes > 0 {
		fmt.Fprintf(w, ", of which %s can wait", seal.Count(notes, "note"))
	}
	fmt.Fprintln(w)
}
