package main

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/grpcserver/join"
	"github.com/beezy-dev/kleidi/internal/completion"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/members"
	"github.com/beezy-dev/kleidi/internal/text"
	"github.com/beezy-dev/kleidi/seal"
)

func newNode(a *app) *cobra.Command {
	return group("node", "Show this machine, approve others to join, list and remove nodes", "",
		newNodeIdentity(a), newNodeApprove(a), newNodeList(a), newNodeRemove(a))
}

func newNodeIdentity(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "identity",
		Short: "Show what an operator needs in order to approve this machine",
		Long: `Show what an operator needs in order to approve this machine: the digest of its TPM's
endorsement key, and how the machine booted. The command needs no keyring and changes
nothing.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			n, err := a.node()
			if err != nil {
				return err
			}
			id, err := members.Identify(cmd.Context(), n)
			if err != nil {
				return files.HintRoot(err)
			}
			return show(cmd, a, id, text.Identity)
		},
	}
}

// newNodeApprove returns the verb node approve. It needs the running serve, whose memory
// alone keeps the approval, and reads the bootstrap files with the rights of the caller.
func newNodeApprove(a *app) *cobra.Command {
	var req admin.ApproveNodeRequest
	var policy string
	var bootstrap []string
	cmd := &cobra.Command{
		Use:   "approve NAME --ek sha256:…",
		Short: "Let another machine join as a node, once",
		Long: `Let another machine join as a node, once, and print the command to run there. Nothing
in that command is secret. The endorsement key of its TPM identifies the machine;
kleidi node identity shows the key there.

The boot policy must accept the boot of the machine: the boot policy in --boot-policy,
or else this node's own. The running kleidi serve keeps the approval in its memory
until the node has joined or the approval expires; a restart forgets it.

Bootstrap files, such as kubeadm's join token and certificate key, go to the machine
once it has proven its TPM and its boot. This node keeps them in locked memory; the
machine writes them below /run/kleidi/bootstrap.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			req.Node = args[0]
			if req.NoTPM && cmd.Flags().Changed("expires") {
				return seal.Errorf("", "leave --expires out", "node approve: --no-tpm lists the node at once and for good, so nothing expires")
			}
			if policy != "" {
				if req.BootPolicy, err = files.Read(policy, maxPolicy); err != nil {
					return fmt.Errorf("--boot-policy: %w", err)
				}
			}
			defer req.Wipe()
			for _, path := range bootstrap {
				b, err := files.ReadSecret(path, join.MaxFiles)
				if err != nil {
					return fmt.Errorf("--bootstrap-file: %w", err)
				}
				req.Files = append(req.Files, admin.BootstrapFile{Name: filepath.Base(path), Content: b})
			}
			r, err := ask(cmd, a, admin.ApproveNode, req)
			if err != nil {
				return err
			}
			return show(cmd, a, r, text.Approval)
		},
	}
	f := cmd.Flags()
	f.StringVar(&req.EK, "ek", "", "the machine's endorsement key, as kleidi node identity shows it")
	f.StringVar(&policy, "boot-policy", "", "the boot policy for the machine's boot (default: tpm.bootPolicy of this node)")
	f.BoolVar(&req.NoTPM, "no-tpm", false, "the machine has no TPM, and opens the keyring with a token, a server or a KMS plugin")
	f.BoolVar(&req.Replace, "replace", false, "the machine takes the place of the node of that name")
	f.DurationVar(&req.Expires, "expires", members.DefaultExpiry, "how long the approval is valid, up to 24h")
	f.StringArrayVar(&bootstrap, "bootstrap-file", nil, "hand this file to the machine; may be repeated, 64 KiB in all")
	cmd.ValidArgsFunction = a.completeArgument(completion.OtherNodes) // with --replace
	_ = cmd.MarkFlagFilename("boot-policy", "yaml", "yml")
	return cmd
}

// maxPolicy bounds a boot policy, in bytes.
const maxPolicy = 1 << 20

func newNodeList(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the nodes that may open the keyring",
		Long: `List the nodes that may open the keyring, and the removed ones that still know its current
KEK. Where no kleidi serve runs, the list is that of the stored keyring, which nothing has
verified.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			l, err := ask(cmd, a, admin.ListNodes, admin.ListNodesRequest{})
			if errors.Is(err, admin.ErrNotRunning) {
				n, nodeErr := a.node()
				if nodeErr != nil {
					return nodeErr
				}
				l, err = members.ListStored(cmd.Context(), n)
			}
			if err != nil {
				return files.HintRoot(err)
			}
			return show(cmd, a, l, text.Nodes)
		},
	}
}
