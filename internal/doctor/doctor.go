// Package doctor looks a node over for a stuck operator. Each check finds one thing that
// is wrong, says why it matters, and names the command that mends it.
//
// A check reads the status report, the configuration and files; it changes nothing. The
// root of the files is a parameter, so that each check is tested with the fault that it is
// there to find, and on a node without one.
package doctor

import (
	"os"
	"path/filepath"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
)

// Finding is what a check has found.
type Finding struct {
	Check string `json:"check"`
	// Note says that the finding can wait, and does not change the exit code.
	Note bool   `json:"note,omitempty"`
	What string `json:"what"`
	Why  string `json:"why"`
	// Command mends it, or begins to.
	Command string `json:"command"`
}

// Report is the result of all checks.
type Report struct {
	// Checks are the names of all checks that were made, in their order.
	Checks   []string  `json:"checks"`
	Findings []Finding `json:"findings"`
}

// Healthy reports whether nothing was found that an operator must mend.
func (r Report) Healthy() bool {
	for _, f := range r.Findings {
		if !f.Note {
			return false
		}
	}
	return true
}

// Node is what the checks look at.
type Node struct {
	Config *config.Config
	Status admin.StatusReport
	// Serving says that the status came from a running serve.
	Serving bool
	// Version is that of the command.
	Version string
	// EncryptionConfig is kube-apiserver's file; Manifest is that of its static pod.
	EncryptionConfig, Manifest string
	// Root is put before all paths; "" but in tests.
	Root string
}

// Examine makes all checks.
func (n *Node) Examine() Report {
	r := Report{Findings: []Finding{}}
	for _, c := range checks {
		r.Checks = append(r.Checks, c.name)
		for _, f := range c.find(n) {
			f.Check = c.name
			r.Findings = append(r.Findings, f)
		}
	}
	return r
}

func (n *Node) path(file string) string { return filepath.Join(n.Root, file) }

func (n *Node) exists(file string) bool {
	_, err := os.Stat(n.path(file))
	return err == nil
}
