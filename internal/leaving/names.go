package leaving

import (
	"fmt"
	"slices"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// names are the names of a request, sorted by what they are to the cluster: nodes of the
// keyring, removed nodes that know its current KEK, names that are only approved to join,
// and the rest. nodes are all nodes of the keyring.
type names struct {
	listed, former, approved, unknown []string
	nodes                             []string
}

// sortNames refuses the name of this node, self.
func sortNames(self string, nodes, former, approved, all []string) (names, error) {
	n := names{nodes: nodes}
	for _, name := range all {
		switch {
		case name == self:
			return n, fmt.Errorf("node %s is this one; run the command on another node, and kleidi reset here", name)
		case slices.Contains(nodes, name):
			n.listed = append(n.listed, name)
		case slices.Contains(former, name):
			n.former = append(n.former, name)
		case slices.Contains(approved, name):
			n.approved = append(n.approved, name)
		default:
			n.unknown = append(n.unknown, name)
		}
	}
	return n, nil
}

func known(k *keyring.Keyring, approved, all []string) (names, error) {
	i := k.Info()
	self, _ := k.Self()
	var nodes []string
	for _, n := range i.Nodes {
		nodes = append(nodes, n.Name)
	}
	return sortNames(self.Name, nodes, i.Former, approved, all)
}

// refuse refuses unknown names. While nodes have yet to trust the current KEK, a name may be
// that of a node whose removal is going on: the keyring no longer names it then.
func (n names) refuse(settling bool) error {
	if len(n.unknown) == 0 || settling {
		return nil
	}
	those := "that name"
	if len(n.unknown) > 1 {
		those = "those names"
	}
	return seal.Errorf("", "kleidi node list shows the nodes", "%s not in the keyring, and no removed node of %s knows its current KEK; the nodes are %s",
		areNodes(n.unknown), those, slotview.JoinWords(n.nodes))
}

// doubt tells of unknown names that were not refused.
func (n names) doubt() (changes []string) {
	if len(n.unknown) > 0 {
		changes = append(changes, areNodes(n.unknown)+" not in the keyring: the removal was begun before, or the name is wrong; kleidi node list shows the nodes")
	}
	return changes
}

// nodesNamed returns "node a", or "nodes a, b".
func nodesNamed(names []string) string {
	if len(names) == 1 {
		return "node " + names[0]
	}
	return "nodes " + slotview.JoinWords(names)
}

// areNodes returns "node a is", or "nodes a, b are".
func areNodes(names []string) string {
	if len(names) == 1 {
		return nodesNamed(names) + " is"
	}
	return nodesNamed(names) + " are"
}

// ToCutOff returns which of the names must be cut off before they are removed: all of them
// but those that never joined. It refuses the names that [Remove] refuses, so that a command
// does not ask to cut off a node that it will not remove.
func ToCutOff(l admin.NodeList, all []string) ([]string, error) {
	var self string
	var nodes, approved []string
	for _, n := range l.Nodes {
		nodes = append(nodes, n.Node)
		if n.Self {
			self = n.Node
		}
	}
	for _, a := range l.Approvals {
		approved = append(approved, a.Node)
	}
	sorted, err := sortNames(self, nodes, l.Former, approved, all)
	if err == nil {
		err = sorted.refuse(l.Cluster != nil && l.Cluster.Rotation != nil && l.Cluster.Rotation.Phase == admin.RotationSettling)
	}
	if err != nil {
		return nil, fmt.Errorf("remove: %w", err)
	}
	return slices.DeleteFunc(slices.Clone(all), func(name string) bool { return slices.Contains(sorted.approved, name) }), nil
}
