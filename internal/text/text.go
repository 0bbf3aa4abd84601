// Package text prints the results of the commands for a person. -o json prints the same
// results for a program.
package text

import (
	"fmt"
	"io"
	"strings"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
)

func row(w io.Writer, name, value string) {
	if value != "" {
		fmt.Fprintf(w, "%-14s %s\n", name, strings.TrimRight(value, " "))
	}
}

// problem prints each detail of a refusal on a separate line.
func problem(w io.Writer, p *admin.Problem) {
	if p == nil {
		return
	}
	message := p.Message
	if len(p.Details) > 0 {
		message += ":"
	}
	for _, line := range append([]string{message}, p.Details...) {
		fmt.Fprintf(w, "%-14s   %s\n", "", line)
	}
	if p.Hint != "" {
		fmt.Fprintf(w, "%-14s   -> %s\n", "", p.Hint)
	}
}

// State prints a keyring after a change.
func State(w io.Writer, s admin.KeyringState) {
	fmt.Fprintf(w, "current key ID  %s\n", s.CurrentKeyID)
	if s.Former != "" {
		fmt.Fprintf(w, "former key ID   %s\n", s.Former)
	}
	fmt.Fprintf(w, "revision        %d\n", s.Revision)
	for _, c := range s.Changes {
		fmt.Fprintf(w, "- %s\n", c)
	}
}

// Error prints each detail of a refusal, and then its hint, on separate lines.
func Error(w io.Writer, err error) {
	p := admin.ProblemOf(err)
	if len(p.Details) == 0 {
		fmt.Fprintln(w, "error:", err)
		return
	}
	fmt.Fprintf(w, "error: %s:\n  %s\n", p.Message, strings.Join(p.Details, "\n  "))
	if p.Hint != "" {
		fmt.Fprintln(w, "  ->", p.Hint)
	}
}
