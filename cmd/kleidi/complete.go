package main

import (
	"log/slog"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/internal/lifecycle"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// complete completes what the stored keyring names. It reads one file: a shell that waits
// for a TPM at each press of a key would be worse than none. Without rights on the file there
// is nothing to complete.
func (a *app) complete(words func(*node.Node, *keyring.Untrusted) []string) cobra.CompletionFunc {
	return func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
		const none = cobra.ShellCompDirectiveNoFileComp
		cfg, err := a.config()
		if err != nil {
			return nil, none
		}
		u, _, err := lifecycle.ReadStored(cmd.Context(), cfg)
		if err != nil {
			return nil, none
		}
		n, err := node.New(cfg, slog.New(slog.DiscardHandler), nil)
		if err != nil {
			return nil, none
		}
		defer n.Close()
		return words(n, u), none
	}
}

func slotNames(n *node.Node, u *keyring.Untrusted) []string {
	return slotview.Names(n.View.WithMissing(slotview.WithoutDebts(u.Slots())))
}

func unrevokedEKs(n *node.Node, u *keyring.Untrusted) (all []string) {
	for _, d := range n.View.Debts(u.Slots()) {
		all = append(all, d.EK)
	}
	return all
}

// signers are the fingerprints of the keys that sign boot states.
func signers(n *node.Node, u *keyring.Untrusted) (all []string) {
	for _, s := range u.Slots() {
		if key, _ := n.View.Signer(s, u.Info().ClusterID.String()); key != "" {
			all = append(all, key)
		}
	}
	return all
}
