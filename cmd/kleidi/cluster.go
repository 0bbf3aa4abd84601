package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/internal/clusteraccess"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/seal"
)

func newCluster(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use: "cluster", Short: "Let this node share the keyring through the cluster's API",
		Args: noVerb, RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newClusterSetup(a))
	return cmd
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
			return a.show(cmd.OutOrStdout(), r, func(w io.Writer) { printClusterSetup(w, r, a.configFile()) })
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

func printClusterSetup(w io.Writer, r *clusteraccess.Result, configFile string) {
	for _, c := range r.Changes {
		fmt.Fprintf(w, "- %s\n", c)
	}
	if len(r.Changes) == 0 {
		fmt.Fprintln(w, "nothing to do: the access works")
	}
	row(w, "user", r.User)
	row(w, "server", r.Server)
	key := r.Key + "  (in the TPM, of use to this machine alone)"
	if !r.KeyInTPM {
		key = r.Key + "  (a file: " + r.WhyFile + ")"
	}
	row(w, "key", key)
	row(w, "certificate", fmt.Sprintf("%s  (until %s)", r.Certificate, r.NotAfter.Local().Format(time.DateTime)))
	row(w, "kubeconfig", r.Kubeconfig)
	fmt.Fprintf(w, "\nnext, as root:\n")
	if !r.Configured {
		if _, err := os.Stat(configFile); errors.Is(err, os.ErrNotExist) {
			fmt.Fprintf(w, "  printf 'apiVersion: %s\\nkind: %s\\n' >> %s\n", config.APIVersion, config.Kind, seal.Quote(configFile))
		}
		fmt.Fprintf(w, "  printf 'cluster:\\n  kubeconfig: %%s\\n' %s >> %s\n", seal.Quote(r.Kubeconfig), seal.Quote(configFile))
	}
	fmt.Fprintf(w, "%s  systemctl restart kleidi\n", packetFilter(r.Server))
}

// packetFilter returns the commands that let the packets of kleidi's unit reach a server
// on another address than the loopback's.
func packetFilter(server string) string {
	u, err := url.Parse(server)
	if err != nil {
		return ""
	}
	ip := net.ParseIP(u.Hostname())
	switch {
	case ip == nil && u.Hostname() != "localhost":
		return "  # kleidi's unit reaches the loopback only: give the server's address with --server, or allow it with IPAddressAllow=\n"
	case ip == nil || ip.IsLoopback():
		return ""
	}
	const folder = "/etc/systemd/system/kleidi.service.d"
	return fmt.Sprintf("  mkdir -p %s\n  printf '[Service]\\nIPAddressAllow=%s\\n' > %s/cluster.conf\n  systemctl daemon-reload\n", folder, ip, folder)
}
