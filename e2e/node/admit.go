package node

import (
	"os"
	"strings"
)

// Admit lets a machine join as a node of that name: the operator compares its EK,
// approves it here, where kleidi serves, and runs the printed command on the machine.
func (n *Node) Admit(name string, m *Node) {
	n.t.Helper()
	var identity struct{ EK string }
	m.JSON(&identity, "node", "identity")
	policy := n.Path("policy.yaml")
	if _, err := os.Stat(policy); err != nil {
		n.Run("bootpolicy", "record", "--file", policy)
	}
	said := string(n.Run("node", "approve", name, "--ek", identity.EK, "--boot-policy", policy))
	_, line, found := strings.Cut(said, "kleidi join ")
	if !found {
		n.t.Fatalf("node approve prints no command:\n%s", said)
	}
	line, _, _ = strings.Cut(line, "\n")
	m.Run("join", strings.Fields(line)...)
}
