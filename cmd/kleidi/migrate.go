package main

import (
	"cmp"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/internal/clusteraccess"
	"github.com/beezy-dev/kleidi/internal/encryptionconfig"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/migrate"
	"github.com/beezy-dev/kleidi/internal/terminal"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/store/kube"
)

// rewriting holds the flags of migrate.
type rewriting struct {
	migrate.Options
	kubeconfig string
	file       string // kube-apiserver's EncryptionConfiguration
}

func newMigrate(a *app) *cobra.Command {
	var o rewriting
	cmd := &cobra.Command{
		Use:   "migrate",
		Short: "Rewrite every stored object under the current key",
		Long: `Make kube-apiserver write every object of the encrypted resources again, so that it
comes under the current key. No object is changed. Where the cluster serves
StorageVersionMigration (storagemigration.k8s.io/v1), kube-controller-manager does the
work; elsewhere the command sends an empty patch for each object.

The resources are those of kube-apiserver's EncryptionConfiguration: the one that
--encryption-config names, else the one on this control-plane node. --resources names
others.

Begin once every kube-apiserver encrypts under the current key, which takes up to three
minutes after a rotation. If the command is interrupted, run it again: what is under the
current key is not written again. Then kleidi usage says whether anything is left.

With --dry-run the command changes nothing. It names the resources, counts the objects if
it would patch them itself, and prints the ClusterRole that the user in the kubeconfig needs.`,
		Example: `  kleidi migrate --dry-run
  kleidi migrate
  kleidi usage`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return o.run(cmd, a) },
	}
	f := cmd.Flags()
	f.StringVar(&o.kubeconfig, "kubeconfig", "", "kubeconfig file (default the administrator's on this control-plane node)")
	f.StringSliceVar(&o.Resources, "resources", nil, "the resources to write again (default those of the EncryptionConfiguration)")
	f.StringVar(&o.file, "encryption-config", "", "kube-apiserver's EncryptionConfiguration (default the one on this control-plane node)")
	cmd.MarkFlagsMutuallyExclusive("encryption-config", "resources")
	_ = cmd.MarkFlagFilename("encryption-config")
	f.StringVar(&o.By, "by", "", "api: by StorageVersionMigration; patch: by patches of the command itself (default what the cluster offers)")
	completeOneOf(cmd, "by", migrate.ByAPI, migrate.ByPatch)
	f.IntVar(&o.Workers, "workers", 8, "patches at once")
	f.Float64Var(&o.Rate, "rate", 200, "patches per second at most")
	f.BoolVar(&o.DryRun, "dry-run", false, "change nothing; name what would be written again, and print the ClusterRole that is needed")
	_ = cmd.MarkFlagFilename("kubeconfig")
	return cmd
}

// check refuses flags that no migration can take.
func (o *rewriting) check() error {
	switch {
	case o.By != "" && o.By != migrate.ByAPI && o.By != migrate.ByPatch:
		return seal.Errorf("", "want "+migrate.ByAPI+" or "+migrate.ByPatch, "--by %q", o.By)
	case o.Workers < 1 || o.Workers > 64:
		return errors.New("--workers: want 1 to 64")
	case o.Rate <= 0:
		return errors.New("--rate: want a number of objects per second, above 0")
	}
	return nil
}

func (o *rewriting) run(cmd *cobra.Command, a *app) error {
	if err := o.check(); err != nil {
		return err
	}
	if len(o.Resources) == 0 {
		var err error
		if o.Resources, err = encryptionconfig.ResourcesIn(o.file); err != nil {
			return files.HintRoot(err)
		}
		o.SkipUnserved = true
	}
	if o.kubeconfig = cmp.Or(o.kubeconfig, clusteraccess.AdminKubeconfig()); o.kubeconfig == "" {
		return seal.Errorf("", "name one with --kubeconfig", "no kubeconfig is found where kubeadm, RKE2 and k3s keep the administrator's")
	}
	c, err := kube.NewClient(kube.Options{Kubeconfig: o.kubeconfig})
	if err != nil {
		return files.HintRoot(fmt.Errorf("migrate: %w", err))
	}
	var done func()
	o.Progress, done = migrationProgress(cmd.ErrOrStderr())
	o.Waiting = func(message string) { fmt.Fprintln(cmd.ErrOrStderr(), "[migrate]", message) }
	r, err := migrate.Run(cmd.Context(), c, o.Options)
	if done(); err != nil {
		if r != nil {
			r.Print(cmd.ErrOrStderr())
		}
		return err
	}
	return a.show(cmd.OutOrStdout(), r, r.Print)
}

// migrationProgress shows on a terminal how many objects of which resource are done.
func migrationProgress(w io.Writer) (progress func(string, int), done func()) {
	show, done := terminal.Progress(w, "objects")
	if show == nil {
		return nil, done
	}
	return func(_ string, n int) { show(int64(n), 0) }, done
}
