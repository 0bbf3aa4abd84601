package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/completion"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/leaving"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/text"
	"github.com/beezy-dev/kleidi/seal"
)

func newReset(a *app) *cobra.Command {
	var yes string
	var withoutTPM bool
	cmd := &cobra.Command{
		Use:   "reset",
		Short: "Make this machine forget its keyring",
		Long: `Make this machine forget its keyring and its anchor. The epoch of the TPM ends first, so
that no kept copy of the keyring opens with this machine's TPM. A backup still opens with the
recovery identity, a token, a server or a KMS plugin.

Run it on a machine that leaves the cluster. On the other nodes, kleidi node list still
shows it. The command asks for the name of the node, or takes it from --yes. It does
nothing beside a running kleidi serve. If it breaks off, run it again.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			n, err := a.node()
			if err != nil {
				return err
			}
			defer n.Close()
			r, err := reset(cmd, n, yes, withoutTPM)
			if err != nil {
				return files.HintRoot(err)
			}
			return show(cmd, a, r, text.Reset)
		},
	}
	cmd.Flags().StringVar(&yes, "yes", "", "this node's name, to forget without being asked")
	a.completeFlag(cmd, "yes", completion.ThisNode)
	cmd.Flags().BoolVar(&withoutTPM, "without-tpm", false, "forget only the files: copies of the keyring still open with this machine's TPM")
	return cmd
}

// reset refuses to work beside a running serve, which would go on answering from memory.
// It takes the state folder before it describes what will be forgotten, so that nothing
// changes between the question and the answer. The answer is the name of the node and not
// "yes": it shows that the command runs on the intended machine.
func reset(cmd *cobra.Command, n *node.Node, yes string, withoutTPM bool) (*leaving.ResetResult, error) {
	if _, err := admin.Dial(cmd.Context(), n.Config.Admin.Socket); err == nil {
		return nil, seal.Errorf("", "stop it (systemctl stop kleidi), then run the command again", "reset: kleidi serve runs on this node, and answers kube-apiserver from its memory")
	} else if !errors.Is(err, admin.ErrNotRunning) {
		return nil, err
	}
	f, err := leaving.ToForget(cmd.Context(), n)
	if err != nil {
		return nil, err
	}
	for _, line := range f.Describe(n) {
		fmt.Fprintln(cmd.ErrOrStderr(), line)
	}
	if err := inputOf(cmd).ConfirmNode(n.Config.Node, yes, "give --yes "+n.Config.Node); err != nil {
		return nil, fmt.Errorf("reset: %w; nothing was changed", err)
	}
	return leaving.Reset(cmd.Context(), n, f, withoutTPM)
}
