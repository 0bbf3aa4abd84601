package reseal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/store"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// Narrowed lists what was removed from the boot policy.
type Narrowed struct {
	File    string              `json:"file"`
	Changes []bootpolicy.Change `json:"changes"`
	DryRun  bool                `json:"dryRun,omitempty"`
}

// NarrowPolicy replaces the boot policy with the narrower one.
func NarrowPolicy(ctx context.Context, n *node.Node, dryRun bool) (*Narrowed, error) {
	path := n.Config.TPM.BootPolicy
	if path == "" {
		return nil, errors.New("no boot policy is configured; set tpm.bootPolicy, or edit a file that you keep elsewhere")
	}
	slots, err := storedSlots(ctx, n)
	if err != nil {
		return nil, err
	}
	file := store.NewFile(path)
	b, version, err := file.Load(ctx)
	if err != nil {
		return nil, fmt.Errorf("boot policy: %w", err)
	}
	p, err := bootpolicy.Parse(b)
	if err != nil {
		return nil, fmt.Errorf("boot policy %s:\n%w", path, err)
	}
	running, err := n.Gate.AttestPCRs(ctx, p.Demanded())
	if err != nil {
		return nil, err
	}
	narrower, err := narrow(ctx, n, p, running.Log, slots)
	if err != nil {
		return nil, err
	}
	r := &Narrowed{File: path, Changes: bootpolicy.Diff(p, narrower), DryRun: dryRun}
	if dryRun || len(r.Changes) == 0 {
		return r, nil
	}
	_, err = file.Save(ctx, narrower.Marshal(), version)
	return r, err
}

// storedSlots returns the stored slots of the current KEK. Nothing authenticates them
// here, but an extra slot only keeps a boot in the boot policy; no slot adds one. The
// running serve keeps its lock on the file meanwhile.
func storedSlots(ctx context.Context, n *node.Node) ([]seal.Slot, error) {
	k, _, err := n.Stored(ctx)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return k.Slots(), nil
}

// narrow returns the boot policy that allows the running boot and the boots of live
// slots.
func narrow(ctx context.Context, n *node.Node, p *bootpolicy.BootPolicy, running *eventlog.Log, slots []seal.Slot) (*bootpolicy.BootPolicy, error) {
	if states, err := n.LiveStates(ctx, slots, tpm.UseSigned); err != nil {
		return nil, err
	} else if len(states) > 0 {
		return nil, errors.New("a slot is for signed boot states, and which boots these are can't be told from it; edit the boot policy by hand")
	}
	states, err := n.LiveStates(ctx, slots, tpm.UsePresent, tpm.UseNext)
	if err != nil {
		return nil, err
	}
	var boots []eventlog.PCRs
	for _, s := range states {
		if s.Bank != p.Hash() {
			return nil, fmt.Errorf("a slot is sealed in bank %s, and the boot policy judges %s; set both to one bank, or edit the boot policy by hand", eventlog.BankName(s.Bank), p.Bank)
		}
		boots = append(boots, s.Values)
	}
	return p.Narrow(running, boots)
}

// allowsTooMuch reports whether the boot policy allows boots to which none of these
// slots is still sealed.
func allowsTooMuch(ctx context.Context, n *node.Node, slots []seal.Slot) bool {
	last := n.Gate.Last()
	if n.Gate.BootPolicy == nil || last == nil {
		return false
	}
	p, err := n.Gate.BootPolicy()
	if err != nil {
		return false
	}
	narrower, err := narrow(ctx, n, p, last.Log, slots)
	return err == nil && !bytes.Equal(narrower.Marshal(), p.Marshal())
}
