package leaving

import (
	"context"
	"fmt"
	"io"

	"github.com/beezy-dev/kleidi/internal/clusteraccess"
	"github.com/beezy-dev/kleidi/internal/node"
)

// CutOff takes away the rights of the nodes in the cluster's API, or says how to, and lists
// the nodes' other ways into the cluster. kubeconfig is an administrator's, or empty.
func CutOff(ctx context.Context, n *node.Node, kubeconfig string, names []string, w io.Writer) error {
	for _, name := range names {
		fmt.Fprintf(w, "cut node %s off first:\n", name)
		if kubeconfig != "" || n.Config.Cluster.Kubeconfig != "" {
			err := n.Access.Cut(ctx, kubeconfig, name)
			if err != nil && kubeconfig != "" {
				return fmt.Errorf("remove: --kubeconfig: %w; the keyring was not changed", err)
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
