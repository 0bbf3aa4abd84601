package leaving

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/store"
	"github.com/beezy-dev/kleidi/tpm"
)

// ResetResult is the output of reset.
type ResetResult struct {
	Node string `json:"node"`
	// ClusterID, KeyID and Revision describe the forgotten keyring. They are empty if
	// there was none, or if it could not be read.
	ClusterID string     `json:"clusterID,omitempty"`
	KeyID     seal.KeyID `json:"keyID,omitempty"`
	Revision  uint64     `json:"revision,omitempty"`
	// Removed are the files that are gone, by path.
	Removed []string `json:"removed"`
	// Changes list what was done, one line each.
	Changes []string `json:"changes"`
}

// Forgettable is the state that a reset would forget on this node. Nothing authenticates
// it.
type Forgettable struct {
	keyring *keyring.Untrusted // nil if there is none, or if it can't be read
	copies  []tpm.Copies
	files   []stateFile
}

// stateFile is a file in the state folder that belongs to the keyring.
type stateFile struct {
	*store.File
	paths []string // the existing ones
}

// ToForget reads the state that a reset would forget. It takes the state folder, so it
// fails while a serve runs.
func ToForget(ctx context.Context, n *node.Node) (*Forgettable, error) {
	if err := n.AcquireState(); err != nil {
		return nil, fmt.Errorf("reset: %w", err)
	}
	f := &Forgettable{}
	for _, b := range storedKeyrings(ctx, n) {
		u, err := keyring.Parse(b)
		if err != nil {
			continue
		}
		if f.keyring == nil {
			f.keyring = u
		}
		f.copies = append(f.copies, copiesIn(n, append(u.Slots(), u.StagedSlots()...))...)
	}
	// The keyring goes last: while it is there, an interrupted reset still knows which
	// epochs to end.
	var all []*store.File
	for _, path := range n.Access.Files() {
		if filepath.Dir(path) == filepath.Clean(n.Config.State.Dir) { // a file elsewhere belongs to the operator
			all = append(all, store.NewFile(path))
		}
	}
	for _, file := range append(all,
		store.NewFile(n.Config.SlotRecord()), store.NewFile(n.Config.BootStates()), store.NewFile(n.Config.Removal()),
		store.NewFile(n.Config.AnchorPath()).Formerly("pin.json"), store.NewFile(n.Config.Keyring()),
	) {
		s := stateFile{File: file}
		for _, path := range file.Paths() {
			if _, err := os.Lstat(path); err == nil {
				s.paths = append(s.paths, path)
			}
		}
		f.files = append(f.files, s)
	}
	return f, nil
}

// storedKeyrings returns the stored keyring and its previous revision, as far as they
// exist.
func storedKeyrings(ctx context.Context, n *node.Node) (all [][]byte) {
	if b, _, err := n.Keyring.File.Load(ctx); err == nil {
		all = append(all, b)
	}
	if b, err := n.Keyring.Previous(ctx); err == nil {
		all = append(all, b)
	}
	return all
}

// copiesIn returns the places where copies of this node's TPM slots open.
func copiesIn(n *node.Node, slots []seal.Slot) (all []tpm.Copies) {
	for _, s := range slotview.TPMParts(slots) {
		if c, err := tpm.CopiesOf(s); err == nil && s.Type == seal.TypeTPM && s.Node == n.Config.Node {
			all = append(all, c)
		}
	}
	for _, d := range n.View.Debts(slots) {
		all = append(all, d.Copies)
	}
	return all
}

// Nothing reports whether there is nothing to forget.
func (f *Forgettable) Nothing() bool {
	return !slices.ContainsFunc(f.files, func(s stateFile) bool { return len(s.paths) > 0 })
}

// Describe tells the operator what a reset forgets, and what remains.
func (f *Forgettable) Describe(n *node.Node) (lines []string) {
	switch {
	case f.keyring == nil:
		lines = append(lines, "node "+n.Config.Node+" has no readable keyring; reset removes the remaining files")
	default:
		lines = append(lines, fmt.Sprintf("node %s forgets the keyring of cluster %s (revision %d, key ID %s)", n.Config.Node, f.keyring.ClusterID(), f.keyring.Revision(), f.keyring.CurrentID()))
		if others := f.others(n); len(others) > 0 {
			lines = append(lines, "these nodes keep it: "+slotview.JoinWords(others))
		} else {
			lines = append(lines, "no other node has it: Secrets in etcd can be read afterwards only with a backup of the keyring and with the recovery identity, a token or a server that opens the backup")
		}
	}
	return append(lines, "reset ends the TPM's epoch: no copy of this node's TPM slots will open any more")
}

func (f *Forgettable) others(n *node.Node) (names []string) {
	for _, other := range f.keyring.Info().Nodes {
		if other.Name != n.Config.Node {
			names = append(names, other.Name)
		}
	}
	return names
}

// Reset forgets this node's keyring and anchor, after it has ended the epoch of the TPM, so
// that kept copies of the keyring no longer open here. If it is interrupted at any step, it
// can be repeated. With withoutTPM it touches no TPM.
func Reset(ctx context.Context, n *node.Node, f *Forgettable, withoutTPM bool) (*ResetResult, error) {
	ctx = context.WithoutCancel(ctx)
	r := &ResetResult{Node: n.Config.Node, Removed: []string{}, Changes: []string{}}
	if f.keyring != nil {
		r.ClusterID, r.KeyID, r.Revision = f.keyring.ClusterID().String(), f.keyring.CurrentID(), f.keyring.Revision()
	}
	if err := r.forgetInTPM(ctx, n, f, withoutTPM); err != nil {
		return nil, fmt.Errorf("reset: %w", err)
	}
	for _, s := range f.files {
		if len(s.paths) == 0 {
			continue
		}
		if err := s.Remove(ctx); err != nil {
			return nil, fmt.Errorf("reset: %w", seal.Errorf(seal.CauseStore, "see the state folder's disk, then run kleidi reset again", "remove %s: %w", s.Path(), err))
		}
		r.Removed = append(r.Removed, s.paths...)
	}
	if f.keyring != nil {
		if others := f.others(n); len(others) > 0 {
			r.Changes = append(r.Changes, fmt.Sprintf("the other nodes (%s) do not learn of this: unless they have removed this node already, run kleidi node remove %s on one of them", slotview.JoinWords(others), n.Config.Node))
		}
	}
	if len(r.Removed) == 0 {
		r.Changes = append(r.Changes, "no file of a keyring was here")
	}
	return r, nil
}

// forgetInTPM ends the epoch, then removes the anchor.
func (r *ResetResult) forgetInTPM(ctx context.Context, n *node.Node, f *Forgettable, withoutTPM bool) error {
	if !n.View.OpensWithTPM() && len(f.copies) == 0 && n.Config.Anchor.Store != config.AnchorTPM {
		return nil
	}
	if withoutTPM {
		r.Changes = append(r.Changes, "the TPM was not touched: COPIES OF THIS NODE'S TPM SLOTS STILL OPEN with it; clear it or destroy it")
		return nil
	}
	changes, err := endEpochs(ctx, n, f)
	if err != nil {
		return seal.AddHint(err, "to forget only the files, run kleidi reset --without-tpm, after which copies of the keyring still open with that TPM")
	}
	r.Changes = append(r.Changes, changes...)
	if anchor, ok := n.Anchor.(interface{ Remove(context.Context) error }); ok {
		if err := anchor.Remove(ctx); err != nil {
			return err
		}
		r.Changes = append(r.Changes, fmt.Sprintf("the anchor's NV index %#08x is removed from the TPM", n.Config.Anchor.Index))
	}
	return nil
}

// endEpochs ends the present epoch, and the epochs of these copies if their slots are for
// a later one.
func endEpochs(ctx context.Context, n *node.Node, f *Forgettable) (changes []string, err error) {
	if _, err := n.TPM.EndEpoch(ctx); err != nil {
		return nil, err
	}
	changes = append(changes, fmt.Sprintf("the TPM's epoch has ended: its counter (NV index %#08x) stays, and kept copies of slots of this TPM no longer open", n.Config.TPM.EpochIndex))
	for _, c := range f.copies {
		line := ""
		switch err := n.Refuse(ctx, c); seal.CauseOf(err) {
		case seal.CauseTPMCleared: // the key that opened the copies is gone
		case seal.CauseOtherTPM:
			line = "which is not here to refuse them"
		case seal.CauseEpoch:
			line = "for " + seal.OneLine(err.Error(), 200)
		default:
			if err != nil {
				return nil, err
			}
		}
		if line != "" {
			changes = append(changes, fmt.Sprintf("COPIES OF FORMER SLOTS STILL OPEN with the TPM of endorsement key %s, %s; clear that TPM or destroy it", c.EK, line))
		}
	}
	slices.Sort(changes)
	return slices.Compact(changes), nil
}
