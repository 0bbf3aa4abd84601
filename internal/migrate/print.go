package migrate

import (
	"fmt"
	"io"
	"strings"

	"github.com/beezy-dev/kleidi/seal"
)

// Print prints the result for a person.
func (r *Result) Print(w io.Writer) {
	for _, name := range r.Unserved {
		fmt.Fprintf(w, "%s: the API serves no such resource\n", seal.OneLine(name, 100))
	}
	for _, m := range r.Resources {
		switch {
		case r.By == ByAPI && r.DryRun:
			fmt.Fprintf(w, "%s: a StorageVersionMigration would write them again\n", seal.OneLine(m.Name, 100))
		case r.By == ByAPI:
			fmt.Fprintf(w, "%s: written again by StorageVersionMigration\n", seal.OneLine(m.Name, 100))
		case r.DryRun:
			fmt.Fprintf(w, "%s: %s would be patched\n", seal.OneLine(m.Name, 100), seal.Count(m.Objects, "object"))
		default:
			fmt.Fprintf(w, "%s: %s written again where needed%s\n", seal.OneLine(m.Name, 100), seal.Count(m.Objects, "object"), meanwhile(m))
		}
	}
	if r.DryRun {
		fmt.Fprintf(w, "\n# the user in the kubeconfig needs:\n%s", r.ClusterRole)
		return
	}
	fmt.Fprintln(w, "see with kleidi usage whether anything is left under another key")
}

func meanwhile(m Migrated) string {
	var all []string
	if m.Conflicts > 0 {
		all = append(all, fmt.Sprintf("%d tried again after a conflict", m.Conflicts))
	}
	if m.Gone > 0 {
		all = append(all, fmt.Sprintf("%d deleted meanwhile", m.Gone))
	}
	if m.Refused > 0 {
		all = append(all, fmt.Sprintf("%d refused", m.Refused))
	}
	if len(all) == 0 {
		return ""
	}
	return " (" + strings.Join(all, ", ") + ")"
}
