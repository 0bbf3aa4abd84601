package text

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"time"

	"github.com/beezy-dev/kleidi/internal/clusteraccess"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/founding"
	"github.com/beezy-dev/kleidi/internal/verifierd"
	"github.com/beezy-dev/kleidi/seal"
)

// ClusterSetup prints the result of setting up access to the cluster store.
func ClusterSetup(w io.Writer, r *clusteraccess.Result, configFile string) {
	for _, c := range r.Changes {
		fmt.Fprintf(w, "- %s\n", c)
	}
	if len(r.Changes) == 0 {
		fmt.Fprintln(w, "nothing to do: the access works")
	}
	row(w, "user", r.User)
	row(w, "server", r.Server)
	key := r.Key + "  (in the TPM, usable only on this machine)"
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
// at an address other than loopback.
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

// Init prints the first keyring of a cluster.
func Init(w io.Writer, r *founding.InitResult, token *founding.Import, order []string, next string) {
	node := r.Node
	if r.EK != "" {
		node += fmt.Sprintf(" (EK %.23s…)", r.EK)
	}
	fmt.Fprintf(w, "\nkeyring %s made\n  cluster ID  %s\n  key ID      %s\n  node        %s\n", r.Keyring, r.ClusterID, r.KeyID, node)
	for _, s := range r.Slots {
		fmt.Fprintf(w, "  slot        %s\n", s)
	}
	if token != nil {
		imported(w, token, order)
	}
	fmt.Fprintf(w, "\nnext: %s\n", next)
}

// imported prints the settings to add to the configuration.
func imported(w io.Writer, i *founding.Import, order []string) {
	fmt.Fprintf(w, "\nadd to the configuration, so that kleidi serve can use the token:\n\n  pkcs11:\n    module: %s\n    uri: %s\n    pinFile: %s\n",
		i.Token.Module, i.Token.URI, i.Token.PINFile)
	if !i.Opens(order) {
		fmt.Fprintf(w, "\nthe token opens nothing at start until unlock.order names pkcs11, as in [tpm, pkcs11]\n")
	}
	fmt.Fprintf(w, "\n%s holds the PIN as well, for kleidi 1.x: when that is gone, remove the file and change the PIN\n", i.From)
}

// Verifier prints the configuration of a verifier.
func Verifier(w io.Writer, r *verifierd.Report) {
	row(w, "configuration", r.Config)
	row(w, "cluster ID", r.ClusterID)
	row(w, "listens on", r.Listen)
	row(w, "certificate", r.Certificate)
	for _, n := range r.Nodes {
		row(w, "node", fmt.Sprintf("%s  EK %s  %s", n.Name, n.EK, n.BootPolicy))
	}
	fmt.Fprintf(w, "\non every node, write this to %s:\n\n%s\nand into its configuration:\n\n%s", verifierd.PublicKeyPath, r.PublicKey, r.NodeConfiguration)
}
