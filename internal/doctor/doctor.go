// Package doctor looks a node over for an operator who is stuck. Each check finds one
// fault, says why it matters, and names the command that repairs it.
//
// The facts are gathered in one place (package gather) and handed to the checks as a
// [Node]. A check is a small function over these facts and over files; it changes
// nothing, and asks no device and no server. Package diagnosis has the words of the
// findings. The root of the files is a parameter, so that each check is tested with the
// fault that it looks for, and on a node without one.
//
// A fact that could not be gathered carries the reason. A check that needs the fact then
// reports that it was not made, and why: silence means that nothing was found.
package doctor

import (
	"regexp"
	"strings"

	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/doctor/diagnosis"
	"github.com/beezy-dev/kleidi/seal"
)

// check finds one kind of fault.
type check struct {
	name string
	find func(*Node) []diagnosis.Finding
}

// checks are in the order in which an operator repairs faults: a check comes before those
// that depend on its subject.
var checks = []check{
	{"tpm", tpmThere},
	{"tpm-users", tpmUsers},
	{"owner-authorization", ownerAuthorization},
	{"event-log", eventLog},
	{"pcrs", pcrs},
	{"phase", phase},
	{"folders", folders},
	{"files", fileModes},
	{"disk", disk},
	{"unit", unit},
	{"serve", serving},
	{"version", version},
	{"keyring", open},
	{"retired-keks", retired},
	{"keyslots", keyslots},
	{"recovery", recoverySlot},
	{"suspension", suspension},
	{"debts", debts},
	{"changed-outside", changedOutside},
	{"memory", memory},
	{"root", rootVerified},
	{"sockets", sockets},
	{"encryption-configuration", encryptionConfiguration},
	{"manifest", manifest},
	{"kube-apiserver", apiserver},
	{"cluster-store", clusterStore},
	{"nodes", nodes},
	{"approvals", approvals},
	{"token", token},
	{"vault", vault},
	{"clock", clock},
	{"hooks", hooks},
	{"next-boot", nextBoot},
	{"leftovers", leftovers},
}

// Examine makes all checks, in their order.
func (n *Node) Examine() diagnosis.Report {
	r := diagnosis.Report{Findings: []diagnosis.Finding{}, NotChecked: []diagnosis.Unchecked{}}
	for _, c := range checks {
		r.Checks = append(r.Checks, c.name)
		if n.NoConfig != "" {
			r.Add(c.name, diagnosis.NotChecked("the configuration can't be read"))
			continue
		}
		r.Add(c.name, c.find(n))
	}
	if n.NoConfig != "" {
		f := n.refused()
		check, _, _ := strings.Cut(f[0].ID, "/")
		r.Add(check, f)
	}
	for i := range r.Findings {
		r.Findings[i].Command = n.configured(r.Findings[i].Command)
	}
	return r
}

// kleidiCommand matches the beginning of each of kleidi's commands in a line for a shell.
var kleidiCommand = regexp.MustCompile(`(^|&& )kleidi `)

// configured names the configuration file in kleidi's commands, unless kleidi reads it
// unasked. Another node has a file of its own.
func (n *Node) configured(line string) string {
	commands, comment, commented := strings.Cut(line, "   # ")
	if n.ConfigFile == config.DefaultPath || strings.HasPrefix(comment, "on ") {
		return line
	}
	commands = kleidiCommand.ReplaceAllStringFunc(commands, func(begin string) string {
		return begin + "--config " + seal.Quote(n.ConfigFile) + " "
	})
	if commented {
		commands += "   # " + comment
	}
	return commands
}

// refused returns why there is no configuration. If others can write the file, kleidi reads
// nothing in it.
func (n *Node) refused() []diagnosis.Finding {
	if f := n.writable(n.ConfigFile); f != nil {
		return f
	}
	return diagnosis.Found("configuration/refused", "kleidi status   # repeat until it no longer complains of the configuration", "%s", strings.Join(strings.Fields(n.NoConfig), " "))
}
