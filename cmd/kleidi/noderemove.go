package main

import (
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/follow"
	"github.com/beezy-dev/kleidi/internal/leaving"
	"github.com/beezy-dev/kleidi/internal/text"
)

// removal are the flags of node remove.
type removal struct {
	also       []string
	kubeconfig string
	yes        bool
	cutOff     bool
	watch      follow.Options
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
prints the commands. It then asks whether the node no longer has a way to etcd; --yes
--cut-off says so.

Then it drops the node from the keyring, waits until every remaining node has followed,
makes them take a fresh KEK, and waits until each of them trusts that KEK alone. A node
that was down may be removed in the same step, with --also. While nodes are missing, the
command names them; it may be interrupted, and run again on any remaining node. The exit
code is 0 once the removal is complete, and 3 while it waits for nodes.

Without a cluster store the command works only if this node alone remains.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return o.run(cmd, a, args[0]) },
	}
	f := cmd.Flags()
	f.StringArrayVar(&o.also, "also", nil, "remove this node too; may be repeated")
	f.StringVar(&o.kubeconfig, "kubeconfig", "", "kubeconfig of an administrator, to take the node's rights away with")
	f.BoolVar(&o.yes, "yes", false, "do not ask; goes with --cut-off")
	f.BoolVar(&o.cutOff, "cut-off", false, "the node can no longer reach the cluster's API or its etcd")
	f.StringArrayVar(&o.rotate.SkipSlots, "skip-slot", nil, "leave out this slot of the fresh KEK for now, by its name in kleidi slot list; may be repeated")
	f.BoolVar(&o.rotate.AcceptDataLoss, "accept-data-loss", false, "skip the last recovery slot as well: if all TPMs fail, all Secrets are lost")
	addWatchFlags(cmd, &o.watch, "watch until every node trusts the fresh KEK", "watch no longer than this")
	_ = cmd.MarkFlagFilename("kubeconfig")
	return cmd
}

// run refuses names that are no nodes before it prints or does anything.
func (o *removal) run(cmd *cobra.Command, a *app, name string) error {
	names := append([]string{name}, o.also...)
	slices.Sort(names)
	names = slices.Compact(names)
	if o.yes != o.cutOff {
		return errors.New("remove: give --yes and --cut-off together: they state that the node can no longer reach the cluster's API or its etcd")
	}
	l, err := ask(cmd, a, admin.ListNodes, admin.ListNodesRequest{})
	if err != nil {
		return err
	}
	joined, err := leaving.ToCutOff(l, names)
	if err != nil {
		return err
	}
	if len(joined) > 0 {
		if err := o.cut(cmd, a, joined); err != nil {
			return err
		}
	}
	req := admin.RemoveNodesRequest{Nodes: names, SkipSlots: o.rotate.SkipSlots, AcceptDataLoss: o.rotate.AcceptDataLoss, Confirmed: o.rotate.Confirmed}
	return o.follow(cmd, a, req)
}

// cut cuts the nodes off and asks whether they are, before the keyring is changed: a node
// that knows the KEK and still writes the API or etcd can lead the others astray. Slots
// from outside are confirmed as for rotate, since they receive the fresh KEK.
func (o *removal) cut(cmd *cobra.Command, a *app, names []string) error {
	n, err := a.node()
	if err != nil {
		return err
	}
	if err := leaving.CutOff(cmd.Context(), n, o.kubeconfig, names, cmd.ErrOrStderr()); err != nil {
		return err
	}
	if err := confirmSlots(cmd, a, &o.rotate, o.yes); err != nil {
		return err
	}
	if o.yes {
		return nil
	}
	fmt.Fprintln(cmd.ErrOrStderr(), "is each node to remove cut off, as described above?")
	for _, name := range names {
		if err := inputOf(cmd).ConfirmNode(name, "", "give --yes --cut-off once the node is cut off"); err != nil {
			return fmt.Errorf("remove: the keyring was not changed: %w", err)
		}
	}
	return nil
}

// follow takes the steps of a removal, and shows the result. The exit code is exitWaiting
// while nodes are missing.
func (o *removal) follow(cmd *cobra.Command, a *app, req admin.RemoveNodesRequest) error {
	o.watch.Say = newPerson(cmd).Tell
	r, err := follow.Removal(cmd.Context(), o.watch, func(req admin.RemoveNodesRequest) (admin.NodeRemoval, error) {
		return ask(cmd, a, admin.RemoveNodes, req)
	}, req)
	if err != nil {
		return err
	}
	if err := show(cmd, a, r, text.Removal); err != nil {
		return err
	}
	if r.Phase != admin.RemovalDone {
		return &exitError{code: exitWaiting}
	}
	return nil
}
