package main

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/grpcserver/join"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/members"
	"github.com/beezy-dev/kleidi/seal"
)

func newNode(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use: "node", Short: "Show this machine, approve others to join, list and remove nodes",
		Args: noVerb, RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newNodeIdentity(a), newNodeApprove(a), newNodeList(a), newNodeRemove(a))
	return cmd
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
			return a.show(cmd.OutOrStdout(), id, func(w io.Writer) {
				row(w, "node", id.Node)
				row(w, "EK", id.EK+"  (endorsement key)")
				row(w, "SRK", id.SRK+"  (storage root key)")
				row(w, "epoch index", fmt.Sprintf("%#08x", id.EpochIndex))
				row(w, "boot", id.Boot)
				for _, i := range slices.Sorted(maps.Keys(id.PCRs)) {
					row(w, fmt.Sprintf("PCR %d", i), id.PCRs[i]+"  ("+id.Bank+")")
				}
			})
		},
	}
}

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
			return a.show(cmd.OutOrStdout(), r, func(w io.Writer) { printApproval(w, r) })
		},
	}
	f := cmd.Flags()
	f.StringVar(&req.EK, "ek", "", "the machine's endorsement key, as kleidi node identity shows it")
	f.StringVar(&policy, "boot-policy", "", "the boot policy for the machine's boot (default: tpm.bootPolicy of this node)")
	f.BoolVar(&req.NoTPM, "no-tpm", false, "the machine has no TPM, and opens the keyring with a token or a server")
	f.BoolVar(&req.Replace, "replace", false, "the machine takes the place of the node of that name")
	f.DurationVar(&req.Expires, "expires", members.DefaultExpiry, "how long the approval is valid, up to 24h")
	f.StringArrayVar(&bootstrap, "bootstrap-file", nil, "hand this file to the machine; may be repeated, 64 KiB in all")
	cmd.ValidArgsFunction = a.completeArgument(otherNodes) // with --replace
	_ = cmd.MarkFlagFilename("boot-policy", "yaml", "yml")
	return cmd
}

// maxPolicy bounds a boot policy, in bytes.
const maxPolicy = 1 << 20

func printApproval(w io.Writer, r admin.NodeApproval) {
	for _, c := range r.Changes {
		fmt.Fprintf(w, "- %s\n", c)
	}
	if !r.Expires.IsZero() {
		fmt.Fprintf(w, "node %s is approved until %s; run this there, as root:\n\n", r.Node, r.Expires.Local().Format(time.DateTime))
	}
	fmt.Fprintf(w, "%s\n", r.Command)
}

func newNodeList(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the nodes that may open the keyring",
		Long: `List the nodes that may open the keyring. Where no kleidi serve runs, the list is that of
the stored keyring, which nothing has verified.`,
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
			return a.show(cmd.OutOrStdout(), l, func(w io.Writer) { printNodes(w, l) })
		},
	}
}

func printNodes(w io.Writer, l admin.NodeList) {
	row(w, "cluster ID", l.ClusterID)
	row(w, "current key ID", string(l.KeyID))
	row(w, "revision", fmt.Sprintf("%d (format %d)", l.Revision, l.Format))
	for _, n := range l.Nodes {
		var notes []string
		for note, is := range map[string]bool{"this one": n.Self, "may change what all share": n.Seat, "has not finished joining": n.Unfinished, "no TPM": n.EK == ""} {
			if is {
				notes = append(notes, note)
			}
		}
		slices.Sort(notes)
		text := n.EK
		if len(notes) > 0 {
			text += " (" + strings.Join(notes, ", ") + ")"
		}
		if !n.Added.IsZero() {
			text += "  added " + n.Added.Local().Format(time.DateTime)
		}
		row(w, n.Node, strings.TrimSpace(text))
		printRecord(w, n.Record)
	}
	printCluster(w, l.Cluster)
	if l.Stored {
		fmt.Fprintln(w, "kleidi serve does not run: this is the stored keyring, which nothing has verified")
	}
}

// ask runs a verb that only a running serve can answer.
func ask[Req, Resp any](cmd *cobra.Command, a *app, verb admin.Verb[Req, Resp], req Req) (Resp, error) {
	var none Resp
	cfg, err := a.config()
	if err != nil {
		return none, err
	}
	client, err := admin.Dial(cmd.Context(), cfg.Admin.Socket)
	if errors.Is(err, admin.ErrNotRunning) {
		return none, seal.WithHint(err, "start it (systemctl start kleidi), since only it can answer")
	}
	if err != nil {
		return none, err
	}
	return admin.Call(cmd.Context(), client, verb, req)
}
