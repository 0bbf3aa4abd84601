package main

import (
	"log/slog"
	"slices"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/internal/lifecycle"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// complete completes names in the stored keyring. It reads one file: completion that
// waits for a TPM at each press of a key would be worse than none. Without rights on the
// file, it completes nothing.
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

// keyIDs are the key IDs in the keyring, the current one first.
func keyIDs(_ *node.Node, u *keyring.Untrusted) []string {
	info := u.Info()
	all := []string{string(info.Current.KeyID)}
	for _, r := range info.Retired {
		all = append(all, string(r.KeyID))
	}
	return all
}

func currentKeyID(_ *node.Node, u *keyring.Untrusted) []string {
	return []string{string(u.CurrentID())}
}

func clusterID(_ *node.Node, u *keyring.Untrusted) []string { return []string{u.ClusterID().String()} }

// otherNodes are the names of the nodes in the keyring, except this one.
func otherNodes(n *node.Node, u *keyring.Untrusted) (all []string) {
	for _, other := range u.Info().Nodes {
		if other.Name != n.Config.Node {
			all = append(all, other.Name)
		}
	}
	return all
}

func thisNode(n *node.Node, _ *keyring.Untrusted) []string { return []string{n.Config.Node} }

// completeFlag completes a flag's value from the keyring.
func (a *app) completeFlag(cmd *cobra.Command, flag string, words func(*node.Node, *keyring.Untrusted) []string) {
	_ = cmd.RegisterFlagCompletionFunc(flag, a.complete(words))
}

// completeOneOf completes a flag that has few values.
func completeOneOf(cmd *cobra.Command, flag string, values ...string) {
	_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
}

// completeArgument completes an argument, unless the verb takes no further one. It leaves
// out the words that are already on the command line.
func (a *app) completeArgument(words func(*node.Node, *keyring.Untrusted) []string) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective) {
		if cmd.ValidateArgs(append(slices.Clone(args), "another")) != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		all, directive := a.complete(words)(cmd, args, toComplete)
		return slices.DeleteFunc(all, func(w string) bool { return slices.Contains(args, w) }), directive
	}
}
