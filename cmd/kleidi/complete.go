package main

import (
	"log/slog"
	"slices"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/internal/completion"
	"github.com/beezy-dev/kleidi/internal/lifecycle"
	"github.com/beezy-dev/kleidi/internal/node"
)

// complete completes names in the stored keyring. It reads one file: completion that
// waits for a TPM at each press of a key would be worse than none. Without rights on the
// file, it completes nothing.
func (a *app) complete(words completion.Words) cobra.CompletionFunc {
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
		return words(n.View, u), none
	}
}

// completeFlag completes a flag's value from the keyring.
func (a *app) completeFlag(cmd *cobra.Command, flag string, words completion.Words) {
	_ = cmd.RegisterFlagCompletionFunc(flag, a.complete(words))
}

// completeOneOf completes a flag that has few values.
func completeOneOf(cmd *cobra.Command, flag string, values ...string) {
	_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
}

// completeArgument completes an argument, unless the verb takes no further one. It leaves
// out the words that are already on the command line.
func (a *app) completeArgument(words completion.Words) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective) {
		if cmd.ValidateArgs(append(slices.Clone(args), "another")) != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		all, directive := a.complete(words)(cmd, args, toComplete)
		return slices.DeleteFunc(all, func(w string) bool { return slices.Contains(args, w) }), directive
	}
}
