package main

import (
	"context"
	"fmt"
	"io"
	"slices"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

func (a *app) newRotate() *cobra.Command {
	var req admin.RotateRequest
	cmd := &cobra.Command{
		Use:   "rotate",
		Short: "Make a fresh KEK the current one",
		Long: `Make a fresh KEK the current one, sealed as the present one is. The former KEK is
retired: it stays in the keyring and still decrypts.

The fresh KEK is wrapped by every wrapper that the present one is, and by the token or
the server that unlock.order names and that had no slot. Where one of them can't be
reached nothing is changed, unless --skip-slot names it: status shows the missing slot
then until kleidi slot add has made it.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			s, err := operate(cmd.Context(), a, admin.Rotate, req, unlocked((*node).rotate))
			if err != nil {
				return err
			}
			return a.show(cmd.OutOrStdout(), s, func(w io.Writer) { printState(w, s) })
		},
	}
	cmd.Flags().StringArrayVar(&req.SkipSlots, "skip-slot", nil, "do without this slot for now, as kleidi slot list names it; may be repeated")
	_ = cmd.RegisterFlagCompletionFunc("skip-slot", a.slotNamesOf)
	return cmd
}

// rotate makes a fresh KEK the current one, in the same slots.
func (n *node) rotate(ctx context.Context, req admin.RotateRequest) (admin.KeyringState, error) {
	var former seal.KeyID
	var before []seal.Slot
	err := n.unlocker.Change(ctx, func(k *keyring.Keyring) ([]*keyring.Keyring, error) {
		former, before = k.CurrentID(), k.Slots()
		all, err := n.complete(ctx, k, req.SkipSlots)
		if err != nil {
			return nil, err
		}
		if all != k {
			defer all.Close()
		}
		revisions, err := n.turn(ctx, all, false, req.SkipSlots...)
		if err != nil {
			err = n.withSkipHint(all, err, "run kleidi rotate")
		}
		return revisions, err
	})
	if err != nil {
		return admin.KeyringState{}, fmt.Errorf("rotate: %w", err)
	}
	k, err := n.unlocker.Keyring()
	if err != nil {
		return admin.KeyringState{}, err
	}
	changes := slices.Concat([]string{"a fresh KEK is current; the former one is retired and still decrypts"}, n.completed(before, k.Slots()), n.leftOut(k.Slots()))
	return n.result(former, append(changes, "kube-apiserver notices within about a minute; then rewrite stored Secrets: kubectl get secrets -A -o json | kubectl replace -f -")...)
}
