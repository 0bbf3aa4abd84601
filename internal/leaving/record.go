package leaving

import (
	"slices"
	"time"

	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// Record is a line of the audit log about one removed node.
type Record struct {
	Time    time.Time `json:"time"`
	Node    string    `json:"node"`
	EK      string    `json:"ek,omitempty"`
	Removal Step      `json:"removal"`
}

// Step is how far a removal has come, and the keyring at that moment.
type Step struct {
	Step     string     `json:"step"`
	KeyID    seal.KeyID `json:"keyID"`
	Revision uint64     `json:"revision"`
}

// The steps.
const (
	// StepDropped follows the revision that drops the node, which still knows the KEK of
	// that revision.
	StepDropped = "dropped"
	// StepDone is recorded when a command sees that every remaining node trusts only a KEK
	// that the removed node does not know.
	StepDone = "done"
)

// records returns a line for each of the named nodes, with the EK that was listed.
func records(step string, k *keyring.Keyring, names []string, listed []keyring.Node) (all []Record) {
	for _, name := range names {
		r := Record{Time: time.Now().UTC(), Node: name, Removal: Step{step, k.CurrentID(), k.Revision()}}
		if i := slices.IndexFunc(listed, func(n keyring.Node) bool { return n.Name == name }); i >= 0 {
			r.EK = listed[i].EK
		}
		all = append(all, r)
	}
	return all
}

// record writes records into the audit log, and returns what the operator must know about a
// failure.
func record(n *node.Node, audit func(...Record) error, all []Record) (changes []string) {
	if err := audit(all...); err != nil {
		n.Log.Error("the audit log can't be written; the removal goes on", "error", err)
		return []string{"THE AUDIT LOG DOES NOT RECORD THIS: audit.file: " + seal.OneLine(err.Error(), 200)}
	}
	return nil
}
