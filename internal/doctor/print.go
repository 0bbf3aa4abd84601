package doctor

import (
	"fmt"
	"io"
)

// Print shows the report to a person.
func (r Report) Print(w io.Writer) {
	for _, f := range r.Findings {
		level := "PROBLEM"
		if f.Note {
			level = "note"
		}
		fmt.Fprintf(w, "%-8s %s: %s\n         why: %s\n         -> %s\n", level, f.ID, f.What, f.Why, f.Command)
	}
	for _, u := range r.Unmade() {
		fmt.Fprintf(w, "%-8s %s: not checked: %s\n", "-", u.Check, u.Reason)
	}
	fmt.Fprintf(w, "%d checks, %d findings\n", len(r.Checks), len(r.Findings))
}
