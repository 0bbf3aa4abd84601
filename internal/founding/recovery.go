package founding

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/recovery"
	"github.com/beezy-dev/kleidi/seal/rotation"
)

// makeRecovery wraps the KEK to the recipients, or to a new identity.
func makeRecovery(ctx context.Context, n *node.Node, kek *seal.Secret, opts InitOptions) (seal.Slot, error) {
	recipients := opts.Recipients
	var identity *seal.Secret
	if len(recipients) == 0 {
		var recipient string
		var err error
		if identity, recipient, err = recovery.GenerateIdentity(n.Memory); err != nil {
			return seal.Slot{}, err
		}
		defer identity.Close()
		recipients = []string{recipient}
	}
	w, err := recovery.NewWrapper(n.Memory, recipients)
	if err != nil {
		return seal.Slot{}, fmt.Errorf("--recovery-recipient: %w", err)
	}
	slot, err := w.Wrap(ctx, kek)
	if err == nil && identity != nil {
		err = handOver(ctx, n, opts.Prompter, identity, slot, kek)
	}
	return slot, err
}

// ReadBackTries is the number of times that the operator may mistype the identity.
const ReadBackTries = 3

// handOver shows the identity once, and opens the slot with the identity that the
// operator types: an identity that nobody kept opens nothing.
func handOver(ctx context.Context, n *node.Node, p Prompter, identity *seal.Secret, slot seal.Slot, kek *seal.Secret) error {
	if p == nil {
		return errors.New("there is nobody to keep the recovery identity; give --recovery-recipient")
	}
	if err := p.ShowIdentity(identity); err != nil {
		return err
	}
	for range ReadBackTries {
		given, err := p.AskIdentity()
		if err != nil {
			return notGivenBack(err)
		}
		if err = identityOpens(ctx, n, given, slot, kek); err == nil {
			return nil
		}
		p.Tell(fmt.Sprintf("that does not open the recovery slot: %v", err))
	}
	return notGivenBack(fmt.Errorf("%d lines did not open the recovery slot", ReadBackTries))
}

func notGivenBack(err error) error {
	if errors.Is(err, io.EOF) {
		err = errors.New("the input ended")
	}
	return fmt.Errorf("the recovery identity was not typed again: %w; nothing was made, run kleidi init again, or name --recovery-recipient age1…", err)
}

func identityOpens(ctx context.Context, n *node.Node, identity []byte, slot seal.Slot, kek *seal.Secret) error {
	secret, err := n.Memory.Take(identity)
	if err != nil {
		return err
	}
	defer secret.Close()
	w, err := recovery.NewOpener(n.Memory, secret)
	if err != nil {
		return err
	}
	return rotation.Prove(ctx, kek, []seal.Slot{slot}, []seal.Wrapper{w})
}
