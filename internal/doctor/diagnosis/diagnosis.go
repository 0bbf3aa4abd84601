// Package diagnosis is the vocabulary of kleidi doctor: the kinds of findings, each with the
// reason why it matters, the commands that a hint, a cause or a distribution of Kubernetes calls
// for, and the report that a person or a program reads. It knows nothing of nodes and of checks.
package diagnosis

import "fmt"

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

// Found is one finding of a kind.
func Found(id, command, format string, args ...any) []Finding {
	k, ok := Kinds[id]
	if !ok {
		panic("doctor: no kind " + id)
	}
	return []Finding{{ID: id, Note: k.Note, What: fmt.Sprintf(format, args...), Why: k.Why, Command: command}}
}

// NotChecked says that a check was not made, and why.
func NotChecked(format string, args ...any) []Finding {
	return []Finding{{unchecked: true, What: fmt.Sprintf(format, args...)}}
}

// Unchecked is a check that was not made, or not in full.
type Unchecked struct {
	Check  string `json:"check"`
	Reason string `json:"reason"`
}

// Report is the result of all checks.
type Report struct {
	// Checks are the names of all checks, in their order.
	Checks   []string  `json:"checks"`
	Findings []Finding `json:"findings"`
	// NotChecked are the checks that could not be made, with the reason.
	NotChecked []Unchecked `json:"notChecked"`
}

// Add adds the results of a check.
func (r *Report) Add(check string, results []Finding) {
	for _, f := range results {
		if f.unchecked {
			r.NotChecked = append(r.NotChecked, Unchecked{check, f.What})
			continue
		}
		f.Check = check
		r.Findings = append(r.Findings, f)
	}
}

// Healthy reports whether nothing was found that an operator must repair.
func (r Report) Healthy() bool {
	for _, f := range r.Findings {
		if !f.Note {
			return false
		}
	}
	return true
}

// Unmade returns NotChecked, with consecutive checks of the same reason combined.
func (r Report) Unmade() (all []Unchecked) {
	for _, u := range r.NotChecked {
		if last := len(all) - 1; last >= 0 && all[last].Reason == u.Reason {
			all[last].Check += ", " + u.Check
			continue
		}
		all = append(all, u)
	}
	return all
}
