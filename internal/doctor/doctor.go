// Package doctor looks a node over for an operator who is stuck. Each check finds one
// fault, says why it matters, and names the command that repairs it.
//
// The facts are gathered in one place (package gather) and handed to the checks as a
// [Node]. A check is a small function over these facts and over files; it changes
// nothing, and asks no device and no server. The root of the files is a parameter, so
// that each check is tested with the fault that it looks for, and on a node without one.
//
// A fact that could not be gathered carries the reason. A check that needs the fact then
// reports that it was not made, and why: silence means that nothing was found.
package doctor

import (
	"strings"
)

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

// check finds one kind of fault.
type check struct {
	name string
	find func(*Node) []Finding
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
	{"vault", vaultCertificate},
	{"clock", clock},
	{"hooks", hooks},
	{"next-boot", nextBoot},
	{"leftovers", leftovers},
}

// Examine makes all checks, in their order.
func (n *Node) Examine() Report {
	r := Report{Findings: []Finding{}, NotChecked: []Unchecked{}}
	for _, c := range checks {
		r.Checks = append(r.Checks, c.name)
		if n.NoConfig != "" {
			r.NotChecked = append(r.NotChecked, Unchecked{c.name, "the configuration can't be read"})
			continue
		}
		for _, f := range c.find(n) {
			if f.unchecked {
				r.NotChecked = append(r.NotChecked, Unchecked{c.name, f.What})
				continue
			}
			f.Check = c.name
			r.Findings = append(r.Findings, f)
		}
	}
	if n.NoConfig != "" {
		f := n.refused()
		f.Check, _, _ = strings.Cut(f.ID, "/")
		r.Findings = append(r.Findings, f)
	}
	return r
}

// refused returns why there is no configuration. If others can write the file, kleidi reads
// nothing in it.
func (n *Node) refused() Finding {
	if f := n.writable(n.ConfigFile); f != nil {
		return f[0]
	}
	return found("configuration/refused", "kleidi status   # repeat until it names no key: then the file is good", "%s", strings.Join(strings.Fields(n.NoConfig), " "))[0]
}
