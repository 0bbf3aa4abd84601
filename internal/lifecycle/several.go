package lifecycle

import (
	"context"
	"fmt"
	"time"

	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/reseal"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/tpm"
)

// Recovery, or a new TPM, on one node of several concerns that node alone. The KEK and the
// other nodes stay in the keyring, because the other nodes hold the KEK.

// several reports whether a keyring has nodes other than this one.
func several(k *keyring.Keyring) bool { return len(k.Nodes()) > 1 }

const sealedAlone = "the KEK is sealed to this machine's present boot state; all nodes keep that KEK, and no other node is affected"

// reportAborted says that a rotation has ended because this node has another TPM.
func reportAborted(staged seal.KeyID, now *keyring.Keyring) []string {
	if staged == "" || !several(now) || now.StagedID() != "" || now.CurrentID() == staged {
		return nil
	}
	return []string{"the rotation that was going on is aborted, because the former TPM may know its KEK; run kleidi rotate"}
}

// describeSelf returns this machine's entry in a keyring of that format.
func describeSelf(ctx context.Context, n *node.Node, format int) (keyring.Node, error) {
	self := keyring.Node{Name: n.Config.Node}
	if !n.View.OpensWithTPM() {
		return self, nil
	}
	ek, err := n.TPM.Provision(ctx)
	if err != nil || format == 1 {
		self.EK = ek
		return self, err
	}
	self, err = node.Machine(ctx, n)
	self.Added = time.Now()
	return self, err
}

// onThisMachine returns a keyring of one node with self in place of that node, and the
// KEK in these slots.
func onThisMachine(old *keyring.Keyring, self keyring.Node, slots []seal.Slot) (*keyring.Keyring, error) {
	if old.Format() == 1 {
		return old.WithNodes([]keyring.Node{self}, slots)
	}
	if listed, _ := old.Self(); listed.SameTPM(self) {
		return old.WithSlots(slots)
	}
	listed, err := old.WithNode(self, self.Added)
	if err != nil {
		return nil, err
	}
	defer listed.Close()
	return listed.WithSlots(slots)
}

// renewAlone seals the KEK to this machine's present boot state in its own section, and
// with it the staged KEK, if that is open: the node could not end the rotation otherwise. If
// the machine's TPM is not the one that the keyring lists, the seat changes its own
// entry; any other node needs a new approval.
func renewAlone(ctx context.Context, n *node.Node, w *tpm.Wrapper, old *keyring.Keyring, self keyring.Node, owing []seal.Slot) ([]*keyring.Keyring, error) {
	if !n.View.OpensWithTPM() {
		return nil, reseal.ErrNoTPM
	}
	listed, ok := old.Self()
	if !ok || listed.Name != self.Name {
		return nil, fmt.Errorf("the keyring is not node %s's: approve this node and have it join", self.Name)
	}
	if !listed.SameTPM(self) {
		if err := keyring.CheckSeat(old); err != nil {
			return nil, errOtherTPM(self.Name)
		}
		next, err := old.WithNode(self, self.Added)
		if err != nil {
			return nil, err
		}
		defer next.Close()
		old = next
	}
	var own [2][]seal.Slot // of the current KEK and of the staged one
	for i, kek := range []*seal.Secret{old.KEK(), keyring.StagedKEK(old)} {
		if kek == nil {
			continue
		}
		slot, err := reseal.SealPresent(ctx, n, w, kek)
		if err != nil {
			return nil, err
		}
		if own[i], err = n.View.Owing(owing, []seal.Slot{slot}); err != nil {
			return nil, err
		}
	}
	here, err := old.WithOwnSlots(own[0], own[1])
	if err != nil {
		return nil, err
	}
	return []*keyring.Keyring{here}, nil
}

func errOtherTPM(node string) error {
	return fmt.Errorf("the keyring lists another TPM for node %s: approve this node again, with kleidi node approve %s --ek EK --replace, and have it join", node, node)
}
