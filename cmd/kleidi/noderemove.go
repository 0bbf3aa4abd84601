package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/clusteraccess"
)

// followWithin is how long node remove gives the other nodes to follow.
const followWithin = 10 * time.Second

// removal are the flags of node remove.
type removal struct {
	also       []string
	kubeconfig string
	yes        bool
	cutOff     bool
	wait       bool
	timeout    time.Duration
	rotate     admin.RotateRequest
}

func newNodeRemove(a *app) *cobra.Command {
	var o removal
	cmd := &cobra.Command{
		Use:   "remove NAME",
		Short: "Remove a node from the cluster, and replace the KEK that it knows",
		Long: `Remove a node from the cluster, and replace the KEK that it knows.

Whoever has the KEK and can still write the cluster's API or its etcd can lead the other
nodes astray until all of them trust the fresh KEK. So first cut the node off. The
command takes away the node's rights on kleidi's resources where it can, and otherwise
prints the commands. It then asks whether the node has no way to etcd any more; --yes
--cut-off says so.

Then it drops the node from the keyring, waits until every remaining node has followed,
has them take a fresh KEK, and waits until each of them trusts that KEK alone. A node
that was down may be removed in the same step, with --also. While nodes are missing, the
command names them; it may be interrupted, and run again on any remaining node. It ends
in 0 when all is done, and in 3 while it waits.

Without a cluster store the command works only if this node alone remains.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return o.run(cmd, a, args[0]) },
	}
	f := cmd.Flags()
	f.StringArrayVar(&o.also, "also", nil, "remove this node too; may be repeated")
	f.StringVar(&o.kubeconfig, "kubeconfig", "", "kubeconfig of an administrator, who takes the node's rights away")
	f.BoolVar(&o.yes, "yes", false, "do not ask; goes with --cut-off")
	f.BoolVar(&o.cutOff, "cut-off", false, "the node can reach neither the cluster's API nor its etcd any more")
	f.StringArrayVar(&o.rotate.SkipSlots, "skip-slot", nil, "leave out this slot of the fresh KEK for now, by its name in kleidi slot list; may be repeated")
	f.BoolVar(&o.rotate.AcceptDataLoss, "accept-data-loss", false, "skip the last recovery slot as well: if all TPMs fail, all Secrets are lost")
	f.BoolVar(&o.wait, "wait", onTerminal(), "watch until every node trusts the fresh KEK (default true on a terminal)")
	f.DurationVar(&o.timeout, "timeout", 0, "watch no longer than this")
	f.Lookup("wait").DefValue = "false" // the help is the same everywhere
	_ = cmd.MarkFlagFilename("kubeconfig")
	return cmd
}

func (o *removal) run(cmd *cobra.Command, a *app, name string) error {
	names := append([]string{name}, o.also...)
	slices.Sort(names)
	names = slices.Compact(names)
	if o.yes != o.cutOff {
		return errors.New("remove: --yes and --cut-off go together: without being asked, you say that the node has no way to the cluster's API and to its etcd any more")
	}
	if err := o.cut(cmd, a, names); err != nil {
		return err
	}
	if err := confirmSlots(cmd, a, &o.rotate, o.yes); err != nil {
		return err
	}
	if !o.yes {
		fmt.Fprintln(cmd.ErrOrStderr(), "is each node to remove cut off, as said above?")
		for _, name := range names {
			if err := confirmName(cmd, name, "", "give --yes --cut-off once the node is cut off"); err != nil {
				return fmt.Errorf("remove: the keyring was not changed: %w", err)
			}
		}
	}
	req := admin.RemoveNodesRequest{Nodes: names, SkipSlots: o.rotate.SkipSlots, AcceptDataLoss: o.rotate.AcceptDataLoss, Confirmed: o.rotate.Confirmed}
	return o.follow(cmd, a, req)
}

// cut takes the rights of the nodes away, or says how, and says what else gives them a way in.
func (o *removal) cut(cmd *cobra.Command, a *app, names []string) error {
	cfg, err := a.config()
	if err != nil {
		return err
	}
	w := cmd.ErrOrStderr()
	access := &clusteraccess.Access{Node: cfg.Node, Kubeconfig: cfg.Kubeconfig()}
	for _, name := range names {
		fmt.Fprintf(w, "cut node %s off first:\n", name)
		switch {
		case o.kubeconfig == "" && cfg.Cluster.Kubeconfig == "":
		default:
			err := access.Cut(cmd.Context(), o.kubeconfig, name)
			if err != nil && o.kubeconfig != "" {
				return fmt.Errorf("remove: --kubeconfig: %w; nothing was changed", err)
			}
			if err != nil {
				fmt.Fprintf(w, "  its rights on kleidi's resources (this node may not take them away; --kubeconfig ADMIN.CONF may):\n    %s\n", clusteraccess.CutCommand(name))
			} else {
				fmt.Fprintln(w, "  its rights on kleidi's resources are taken away")
			}
		}
		fmt.Fprintf(w, `  its member of etcd, where it has one:
    etcdctl member list
    etcdctl member remove ID
  its client certificates for etcd and for the API stay valid until they end, about a year:
    give etcd a new certificate authority, or --client-crl-file (which a separate
    --listen-client-http-urls needs etcd 3.5.32 or 3.6.13 for)
  its way to the other nodes: the firewall, and kubectl delete node %s
`, name)
	}
	return nil
}

// follow takes the steps of a removal until it is done, as long as the command is to wait.
func (o *removal) follow(cmd *cobra.Command, a *app, req admin.RemoveNodesRequest) error {
	ctx := cmd.Context()
	if o.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, o.timeout)
		defer cancel()
	}
	var changes []string
	said, begun := "", time.Now()
	for {
		r, err := ask(cmd, a, admin.RemoveNodes, req)
		if err != nil {
			return err
		}
		req.Begun = true
		changes = append(changes, r.Changes...)
		r.Changes = changes
		// A KEK is staged only after the nodes that are up have followed, so even a command that
		// does not wait gives them a moment.
		waits := r.Phase != admin.RemovalDone && (o.wait || r.Phase == admin.RemovalFollowing && time.Since(begun) < followWithin) && ctx.Err() == nil
		if text := describeRemoval(r); waits && text != said {
			fmt.Fprintln(cmd.ErrOrStderr(), text)
			said = text
		}
		if waits {
			select {
			case <-ctx.Done():
			case <-time.After(watchEvery):
				continue
			}
		}
		if err := a.show(cmd.OutOrStdout(), r, func(w io.Writer) { printRemoval(w, r) }); err != nil {
			return err
		}
		if r.Phase != admin.RemovalDone {
			return &exitError{code: exitWaiting}
		}
		return nil
	}
}

func describeRemoval(r admin.NodeRemoval) string {
	text := map[admin.RemovalPhase]string{
		admin.RemovalFollowing: "waiting for each remaining node to follow the keyring without the removed one:",
		admin.RemovalStaged:    "waiting for each remaining node to acknowledge the fresh KEK:",
		admin.RemovalSettling:  "waiting for each remaining node to trust the fresh KEK:",
	}[r.Phase]
	for _, w := range r.Waiting {
		text += "\n  " + describeWaiting(w)
	}
	if len(r.Trusting) > 0 {
		text += "\nthese nodes still trust what the removed one knows: " + strings.Join(r.Trusting, ", ")
	}
	return text
}

func printRemoval(w io.Writer, r admin.NodeRemoval) {
	for _, c := range r.Changes {
		fmt.Fprintf(w, "- %s\n", c)
	}
	row(w, "current key ID", string(r.CurrentKeyID))
	row(w, "revision", fmt.Sprint(r.Revision))
	fmt.Fprintln(w, "these ways into the keyring stay; a removed node may have added one of them:")
	for _, way := range r.WaysIn {
		fmt.Fprintf(w, "  %s\n", way)
	}
	if r.Phase == admin.RemovalDone {
		fmt.Fprintf(w, "done: node %s opens no keyring of this cluster, and every node trusts the fresh KEK\n", strings.Join(r.Nodes, ", "))
		return
	}
	fmt.Fprintln(w, describeRemoval(r))
	fmt.Fprintf(w, "not done yet: run kleidi node remove %s again, on any remaining node\n", strings.Join(r.Nodes, " --also "))
}
