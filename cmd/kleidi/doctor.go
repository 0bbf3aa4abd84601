package main

import (
	"cmp"
	"os"
	"runtime"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/hsm"
	"github.com/beezy-dev/kleidi/internal/clusteraccess"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/doctor"
	"github.com/beezy-dev/kleidi/internal/doctor/bundle"
	"github.com/beezy-dev/kleidi/internal/doctor/gather"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/kubeadm"
	"github.com/beezy-dev/kleidi/internal/terminal"
	"github.com/beezy-dev/kleidi/internal/version"
)

// newDoctor returns the verb doctor. A configuration that can't be read becomes a finding
// rather than an error, because doctor is run when something is wrong. The bundle is
// written before the report is printed, and the exit code comes last.
func newDoctor(a *app) *cobra.Command {
	n := doctor.Node{Version: version.String(), Package: packageFile()}
	var kubeconfig, file string
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Look this node over: what is wrong, why it matters, and how to fix it",
		Long: `Look this node over: the TPM and the boot, the keyslots, the running kleidi serve, its
unit, files and memory, kube-apiserver's EncryptionConfiguration, manifest and metrics,
the other nodes, the clock, and hooks for updates. No KEK is opened, and nothing is changed,
except that an attestation key is kept for the next time if there is none yet. A check that
can't be made says so, with the reason.

With --bundle the command also writes a file for a bug report: findings, status, choices of
the configuration, versions, digests of the event log and messages of the journal. It holds
only what a list allows: nothing secret, and no name or path of yours except those in the
findings.

The exit code is 0 if nothing must be fixed, 4 if something must, and 1 if the checks
could not be made.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if n.ConfigFile = a.configPath; n.ConfigFile == "" {
				n.ConfigFile = config.DefaultPath
			}
			if n.Config, err = a.config(); err != nil {
				n.NoConfig = err.Error()
			} else {
				defer terminal.SayWaiting(os.Stderr, "", n.Config.TPM.Timeout)()
				if err := gather.Into(cmd.Context(), &n, cmp.Or(kubeconfig, clusteraccess.AdminKubeconfig())); err != nil {
					return files.HintRoot(err)
				}
			}
			r := n.Examine()
			if file != "" {
				if err := bundle.WriteFile(cmd.Context(), file, &n, r); err != nil {
					return err
				}
			}
			if err := a.show(cmd.OutOrStdout(), r, r.Print); err != nil {
				return err
			}
			if !r.Healthy() {
				return &exitError{code: exitProblem}
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&n.EncryptionConfig, "encryption-config", kubeadm.DefaultEncryptionConfig, "kube-apiserver's EncryptionConfiguration")
	f.StringVar(&n.Manifest, "manifest", kubeadm.Manifest, "the manifest of kube-apiserver, if kubeadm runs it")
	f.StringVar(&kubeconfig, "kubeconfig", "", "kubeconfig that may read kube-apiserver's metrics (default the administrator's on this control-plane node)")
	f.StringVar(&file, "bundle", "", "write a new file (tar.gz) for a bug report, with nothing secret in it")
	_ = cmd.MarkFlagFilename("bundle", "tar.gz", "tgz")
	_ = cmd.MarkFlagFilename("encryption-config", "yaml")
	_ = cmd.MarkFlagFilename("manifest", "yaml")
	_ = cmd.MarkFlagFilename("kubeconfig")
	return cmd
}

// packageFile returns the name of Debian's package of this build.
func packageFile() string {
	name := "kleidi"
	if hsm.Available {
		name = "kleidi-pkcs11"
	}
	return name + "_VERSION_" + runtime.GOARCH + ".deb"
}
