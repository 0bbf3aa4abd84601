package node

import (
	"os"
	"strings"
	"time"
)

// BootPolicy returns a boot policy that accepts this machine's boot, recorded once.
func (n *Node) BootPolicy() string {
	n.t.Helper()
	policy := n.Path("policy.yaml")
	if _, err := os.Stat(policy); err != nil {
		n.Run("bootpolicy", "record", "--file", policy)
	}
	return policy
}

// Approve lets a machine join as a node of that name: the operator compares its EK, and
// approves it here, where kleidi serves. It returns the arguments of the printed kleidi join.
func (n *Node) Approve(name string, m *Node, policy string) []string {
	n.t.Helper()
	var identity struct{ EK string }
	m.JSON(&identity, "node", "identity")
	return n.ApproveEK(name, identity.EK, policy)
}

// ApproveEK is [Node.Approve] for a machine whose EK is known.
func (n *Node) ApproveEK(name, ek, policy string) []string {
	n.t.Helper()
	said := string(n.Run("node", "approve", name, "--ek", ek, "--boot-policy", policy))
	_, command, found := strings.Cut(said, "kleidi join ")
	if !found {
		n.t.Fatalf("node approve prints no command:\n%s", said)
	}
	command, _, _ = strings.Cut(command, "\n")
	return strings.Fields(command)
}

// Admit approves a machine here, by the boot policy of this one, and runs the printed command
// on the machine.
func (n *Node) Admit(name string, m *Node) {
	n.t.Helper()
	args := n.Approve(name, m, n.BootPolicy())
	Again(n.t, 5*time.Minute, name+" joins", func() error { _, err := m.Try("join", args...); return err }, JoinAgain...)
}
