package doctor

import (
	"bytes"
	"slices"
	"strings"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/doctor/diagnosis"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
)

type slot = admin.SlotReport

func serving(n *Node) []diagnosis.Finding {
	if !n.Serving {
		return diagnosis.Found("serve/stopped", "systemctl enable --now kleidi   # if it ends again: journalctl -u kleidi", "kleidi serve does not run")
	}
	if !n.exists(n.Config.KMS.Socket) {
		return diagnosis.Found("serve/no-socket", "systemctl restart kleidi", "kleidi serve runs, but %s is not there", n.Config.KMS.Socket)
	}
	return nil
}

func version(n *Node) []diagnosis.Finding {
	if !n.Serving || n.Status.Version == n.Version {
		return nil
	}
	return diagnosis.Found("version/restart", "systemctl restart kleidi", "kleidi serve is version %s, and the installed one is %s", n.Status.Version, n.Version)
}

func open(n *Node) []diagnosis.Finding {
	problem := n.Status.Problem
	// Without a cause, the problem is that serve does not run, which another check
	// reports.
	if problem == nil && n.Status.Fallback == nil || !n.Serving && problem != nil && problem.Cause == "" {
		return nil
	}
	id := "keyring/locked"
	if n.Status.State == admin.Open {
		id = "keyring/fallback"
	}
	if problem == nil {
		problem = n.Status.Fallback
	}
	return diagnosis.Found(id, remedy(problem, "kleidi status"), "%s", told(problem))
}

// retired finds a keyring that is filling up with retired KEKs. It is the same on every node.
func retired(n *Node) []diagnosis.Finding {
	var ids []seal.KeyID // the newest first
	for _, k := range n.Status.Keys {
		if k.Role == "retired" {
			ids = append(ids, k.KeyID)
		}
	}
	id := "retired-keks/many"
	switch {
	case len(ids) < slotview.ManyRetired:
		return nil
	case len(ids) >= slotview.MostRetired:
		id = "retired-keks/full"
	}
	return diagnosis.Found(id, "kleidi prune "+string(ids[len(ids)-1])+"   # the oldest; then the next, which kleidi keyring show lists",
		"the keyring holds %d retired KEKs, and %d fit", len(ids), slotview.MostRetired)
}

func keyslots(n *Node) (all []diagnosis.Finding) {
	for _, s := range n.Status.Slots {
		switch {
		case s.Type == seal.TypeTPM && n.noBootEvidence():
			continue // the checks of the TPM and of its event log say why
		case s.Problem != nil && !same(s.Problem, n.Status.Problem) && !same(s.Problem, n.Status.Fallback):
			all = append(all, diagnosis.Found("keyslots/refused", remedy(s.Problem, "kleidi slot list"), "keyslot %s does not open: %s", s.Name, told(s.Problem))...)
		case s.SelfTest != nil && !s.SelfTest.Opens && s.SelfTest.Problem != nil:
			all = append(all, diagnosis.Found("keyslots/refused", remedy(s.SelfTest.Problem, "kleidi slot test "+s.Name), "keyslot %s did not open when it was last tested: %s", s.Name, told(s.SelfTest.Problem))...)
		case n.Serving && n.Status.State == admin.Open && s.SelfTest == nil && s.Opens == nil && slotview.IsSecondary(s.Type):
			all = append(all, diagnosis.Found("keyslots/untested", "kleidi slot test "+s.Name, "keyslot %s was never tested since kleidi serve started", s.Name)...)
		}
		if s.SelfTest != nil {
			for _, w := range s.SelfTest.Warnings {
				all = append(all, diagnosis.Found("keyslots/warning", "kleidi slot test "+s.Name, "keyslot %s: %s", s.Name, w)...)
			}
		}
	}
	return all
}

// same reports whether b, which may be nil, says what a says.
func same(a, b *admin.Problem) bool { return b != nil && a.Message == b.Message }

// noBootEvidence reports whether the TPM or the event log keeps every slot of the TPM closed.
func (n *Node) noBootEvidence() bool {
	return n.TPM.Why != "" || n.Boot.Value != nil && (n.Boot.Value.LogProblem != "" || n.Boot.Value.Mismatch != "")
}

func recoverySlot(n *Node) []diagnosis.Finding {
	if len(n.Status.Slots) == 0 || slices.ContainsFunc(n.Status.Slots, func(s slot) bool { return s.Type == seal.TypeRecovery }) {
		return nil
	}
	return diagnosis.Found("recovery/missing", "kleidi slot add recovery --recipient RECIPIENT", "there is no recovery slot")
}

func suspension(n *Node) []diagnosis.Finding {
	if n.Status.Suspension == nil {
		return nil
	}
	return diagnosis.Found("suspension/running", "kleidi reseal", "this node is suspended: %s", n.Status.Suspension)
}

func debts(n *Node) (all []diagnosis.Finding) {
	for _, d := range n.Status.Unrevoked {
		all = append(all, diagnosis.Found("debts/unrevoked", diagnosis.FromHint(d.Hint, "kleidi status"), "%s", d.Message)...)
	}
	return all
}

func changedOutside(n *Node) []diagnosis.Finding {
	if len(n.Status.ChangedOutside) == 0 {
		return nil
	}
	return diagnosis.Found("changed-outside/slots", "kleidi slot list   # then kleidi slot remove NAME for one that you do not know; if all are as you want them, kleidi rotate --yes", "%s added or removed outside kleidi's commands on this node", seal.Count(len(n.Status.ChangedOutside), "slot"))
}

func memory(n *Node) (all []diagnosis.Finding) {
	if n.Status.Memory == "unlocked" {
		all = diagnosis.Found("memory/unlocked", "systemctl edit kleidi   # LimitMEMLOCK=infinity, below [Service]", "the KEK is in memory that is not locked")
	}
	swaps, _ := n.read("/proc/swaps")
	swap := bytes.Count(swaps, []byte("\n")) > 1
	if swap && n.Config.Memory.Lock == config.LockBestEffort {
		all = append(all, diagnosis.Found("memory/swap", "swapoff -a   # and remove it from /etc/fstab", "swap is on, and memory.lock is best-effort")...)
	}
	p := n.Process.Value
	switch {
	case p == nil && n.Process.Why != "":
		return append(all, diagnosis.NotChecked("%s", n.Process.Why)...)
	case p == nil:
		return all
	case p.Locked == 0 && swap && n.Config.Memory.Lock != config.LockBestEffort:
		all = append(all, diagnosis.Found("memory/process", "systemctl edit kleidi   # LimitMEMLOCK=infinity, below [Service]", "no memory of kleidi serve (process %d) is locked, and swap is on", p.PID)...)
	}
	if p.MaxCore != "0" {
		all = append(all, diagnosis.Found("memory/core", "systemctl restart kleidi", "kleidi serve (process %d) may write a core file of %s bytes", p.PID, p.MaxCore)...)
	}
	return all
}

// told returns a problem in one line.
func told(p *admin.Problem) string {
	return strings.Join(append([]string{p.Message}, p.Details...), "; ")
}

func remedy(p *admin.Problem, otherwise string) string {
	return diagnosis.Remedy(p.Cause, p.Hint, otherwise)
}
