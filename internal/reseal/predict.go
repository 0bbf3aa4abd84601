package reseal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/seal/store"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/predict"
)

// Prediction describes the next boot.
type Prediction struct {
	State tpm.BootState
	log   *eventlog.Log
	Moved []int // PCRs that differ from the running boot
}

// Predict computes the next boot from the attested running boot and the files.
func Predict(ctx context.Context, n *node.Node, change predict.Change) (*Prediction, error) {
	pcrs, err := n.Gate.ChoosePCRs()
	if err != nil {
		return nil, err
	}
	quoted := append(slices.Clone(pcrs), 7) // Secure Boot decides what else is measured
	slices.Sort(quoted)
	running, err := n.Gate.AttestPCRs(ctx, slices.Compact(quoted))
	if err != nil {
		return nil, err
	}
	if err := n.Gate.CheckPhase(running.Log); err != nil {
		return nil, err
	}
	change.PCRs = n.Config.TPM.PCRs
	p := &Prediction{}
	if p.log, err = predict.Predict(running.Log, change); err != nil {
		return nil, err
	}
	if len(n.Config.TPM.PCRs) == 0 {
		pcrs = p.log.BootType().PCRs(p.log)
	}
	if p.State, err = n.Gate.Next(p.log, pcrs); err != nil {
		return nil, err
	}
	now, err := running.Log.Replay(n.Config.Bank())
	if err != nil {
		return nil, err
	}
	for _, i := range pcrs {
		if !bytes.Equal(now[i], p.State.Values[i]) {
			p.Moved = append(p.Moved, i)
		}
	}
	return p, anchorFollows(n, now, p.log)
}

// anchorFollows refuses a next boot that could not read the anchor in the TPM.
func anchorFollows(n *node.Node, now eventlog.PCRs, next *eventlog.Log) error {
	if n.Config.Anchor.Store != config.AnchorTPM {
		return nil
	}
	then, err := next.Replay(n.Config.Bank())
	if err != nil {
		return err
	}
	for _, i := range n.Config.Anchor.PCRs {
		if !bytes.Equal(now[i], then[i]) {
			return fmt.Errorf("PCR %d changes, and the anchor in the TPM is bound to it: the next boot will need kleidi recover --trust-key-id KEY_ID with the recovery identity; see docs/threat-model.md", i)
		}
	}
	return nil
}

// allowNext makes the boot policy allow the predicted boot too. It says what it did,
// and returns a function that undoes it.
func allowNext(ctx context.Context, n *node.Node, next *eventlog.Log) (did string, undo func() error, err error) {
	path := n.Config.TPM.BootPolicy
	undo = func() error { return nil }
	if path == "" {
		return "", undo, nil
	}
	file := store.NewFile(path)
	b, version, err := file.Load(ctx)
	if err != nil {
		return "", nil, fmt.Errorf("boot policy: %w", err)
	}
	p, err := bootpolicy.Parse(b)
	if err != nil {
		return "", nil, fmt.Errorf("boot policy %s:\n%w", path, err)
	}
	wider, err := p.AlsoAllow(next)
	if err != nil {
		return "", nil, fmt.Errorf("%s can't allow the next boot: %w", path, err)
	}
	if bytes.Equal(wider.Marshal(), p.Marshal()) {
		return "", undo, nil
	}
	version, err = file.Save(ctx, wider.Marshal(), version)
	if err != nil {
		return "", nil, fmt.Errorf("boot policy: %w", err)
	}
	undo = func() error {
		_, err := file.Save(context.WithoutCancel(ctx), b, version)
		return err
	}
	return "the boot policy " + path + " allows it as well", undo, nil
}

// ToNext predicts the next boot. Unless reseal is nil, it makes the boot policy allow
// that boot, and calls reseal to seal the KEK to it.
func ToNext(ctx context.Context, n *node.Node, change predict.Change, reseal func(*admin.BootState) (admin.KeyringState, error)) (*NextResult, error) {
	p, err := Predict(ctx, n, change)
	if err != nil {
		if _, ok := errors.AsType[*predict.Refusal](err); ok {
			return nil, err
		}
		return nil, files.HintRoot(err)
	}
	r := &NextResult{Bank: n.Config.TPM.Bank, PCRs: map[int]string{}, Moved: p.Moved, BootType: string(p.log.BootType())}
	for i, v := range p.State.Values {
		r.PCRs[i] = fmt.Sprintf("%x", v)
	}
	if reseal == nil {
		return r, nil
	}
	// The boot policy comes first: a slot for a boot that the boot policy refuses would
	// be useless.
	allowed, undo, err := allowNext(ctx, n, p.log)
	if err != nil {
		return nil, err
	}
	s, err := reseal(&admin.BootState{Bank: n.Config.TPM.Bank, PCRs: p.State.Values, Record: p.State.Record})
	if err != nil {
		return nil, errors.Join(err, undo())
	}
	if allowed != "" {
		s.Changes = append(s.Changes, allowed)
	}
	r.Keyring = &s
	return r, nil
}

// NextResult is the output of a reseal to the next boot.
type NextResult struct {
	BootType string              `json:"bootType"`
	Bank     string              `json:"bank"`
	PCRs     map[int]string      `json:"pcrs"`
	Moved    []int               `json:"moved"`
	Keyring  *admin.KeyringState `json:"keyring,omitempty"`
}
