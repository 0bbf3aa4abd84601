package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/internal/clusteraccess"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/text"
	"github.com/beezy-dev/kleidi/seal"
)

func newCluster(a *app) *cobra.Command {
	return group("cluster", "Let this node share the keyring through the cluster's API", "",
		newClusterSetup(a))
}

func newClusterSetup(a *app) *cobra.Command {
	var s clusteraccess.Setup
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "setup --kubeconfig FILE",
		Short: "Make this node's access to the cluster store",
		Long: `Make this node's access to the cluster store, in which the nodes share the keyring. Run
it on each control-plane node, with the kubeconfig of an administrator. It

  - applies kleidi's resource definitions, and a role for this node alone
  - makes a key in this machine's TPM, or in a file where no TPM can keep one
  - has kube-controller-manager sign a client certificate for the node's user
  - writes a kubeconfig, and reads the cluster store with it

The administrator's kubeconfig is read only by this command. To renew the certificate,
run the command again: it leaves alone what works. docs/high-availability.md says more.`,
		Example: `  kleidi cluster setup --kubeconfig /etc/kubernetes/admin.conf
  kleidi cluster setup --dry-run | kubectl diff -f -`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			n, err := a.node()
			if err != nil {
				return err
			}
			if dryRun {
				m := clusterManifests{n.Access.Manifests()}
				return a.show(cmd.OutOrStdout(), m, func(w io.Writer) { fmt.Fprint(w, m.YAML) })
			}
			if s.Admin == "" {
				return seal.Errorf("", "name the kubeconfig of a cluster administrator, such as /etc/kubernetes/admin.conf", "--kubeconfig is missing")
			}
			r, err := n.Access.SetUp(cmd.Context(), s)
			if err != nil {
				return files.HintRoot(fmt.Errorf("cluster setup: %w", err))
			}
			r.Configured = n.Config.Cluster.Kubeconfig != ""
			return a.show(cmd.OutOrStdout(), r, func(w io.Writer) { text.ClusterSetup(w, r, a.configFile()) })
		},
	}
	f := cmd.Flags()
	f.StringVar(&s.Admin, "kubeconfig", "", "kubeconfig of a cluster administrator")
	f.StringVar(&s.Server, "server", "", "URL of the API for this node (default: https://127.0.0.1 if this node's kube-apiserver answers there, else the administrator's)")
	f.BoolVar(&s.KeyInFile, "key-in-file", false, "keep the key in a file even where there is a TPM")
	f.BoolVar(&dryRun, "dry-run", false, "only print what would be applied, as YAML")
	_ = cmd.MarkFlagFilename("kubeconfig")
	return cmd
}

// clusterManifests is the result of kleidi cluster setup --dry-run.
type clusterManifests struct {
	YAML string `json:"yaml"`
}

// configFile returns the path of the configuration file.
func (a *app) configFile() string {
	if a.configPath != "" {
		return a.configPath
	}
	return config.DefaultPath
}
