package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/migrate"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/store/kube"
)

// adminKubeconfigs are where kubeadm, RKE2 and k3s keep the administrator's kubeconfig.
var adminKubeconfigs = []string{"/etc/kubernetes/admin.conf", "/etc/rancher/rke2/rke2.yaml", "/etc/rancher/k3s/k3s.yaml"}

func newMigrate(a *app) *cobra.Command {
	var kubeconfig string
	var o migrate.Options
	cmd := &cobra.Command{
		Use:   "migrate",
		Short: "Have every stored object written again, under the current key",
		Long: `Have kube-apiserver write every object of the encrypted resources again, so that it
comes under the current key. No object is changed. Where the cluster serves
StorageVersionMigration (storagemigration.k8s.io/v1), kube-controller-manager does the
work; elsewhere the command sends an empty patch for each object.

Begin once every kube-apiserver encrypts under the current key, which takes up to three
minutes after a rotation. If the command is interrupted, run it again: what is under the
current key is not written again. Then kleidi usage says whether anything is left.

With --dry-run the command counts the objects, and prints the ClusterRole that the user in
the kubeconfig needs.`,
		Example: `  kleidi migrate --resources=secrets,configmaps
  kleidi usage`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch {
			case o.By != "" && o.By != migrate.ByAPI && o.By != migrate.ByPatch:
				return seal.Errorf("", "want "+migrate.ByAPI+" or "+migrate.ByPatch, "--by %q", o.By)
			case o.Workers < 1 || o.Workers > 64:
				return errors.New("--workers: want 1 to 64")
			case o.Rate <= 0:
				return errors.New("--rate: want a number of objects per second, above 0")
			}
			if kubeconfig == "" {
				i := slices.IndexFunc(adminKubeconfigs, func(path string) bool { _, err := os.Stat(path); return err == nil })
				if i < 0 {
					return seal.Errorf("", "name one with --kubeconfig", "no kubeconfig is found where kubeadm, RKE2 and k3s keep the administrator's")
				}
				kubeconfig = adminKubeconfigs[i]
			}
			c, err := kube.NewClient(kube.Options{Kubeconfig: kubeconfig})
			if err != nil {
				return files.HintRoot(fmt.Errorf("migrate: %w", err))
			}
			var done func()
			o.Progress, done = migrationProgress(cmd.ErrOrStderr())
			r, err := migrate.Run(cmd.Context(), c, o)
			if done(); err != nil {
				if r != nil {
					printMigrated(cmd.ErrOrStderr(), r)
				}
				return err
			}
			return a.show(cmd.OutOrStdout(), r, func(w io.Writer) { printMigrated(w, r) })
		},
	}
	f := cmd.Flags()
	f.StringVar(&kubeconfig, "kubeconfig", "", "kubeconfig file (default the administrator's on this control-plane node)")
	f.StringSliceVar(&o.Resources, "resources", []string{"secrets"}, "the resources of the EncryptionConfiguration")
	f.StringVar(&o.By, "by", "", "api: by StorageVersionMigration; patch: by patches of the command itself (default what the cluster offers)")
	completeOneOf(cmd, "by", migrate.ByAPI, migrate.ByPatch)
	f.IntVar(&o.Workers, "workers", 8, "patches at once")
	f.Float64Var(&o.Rate, "rate", 200, "patches per second at most")
	f.BoolVar(&o.DryRun, "dry-run", false, "change nothing; count, and print the ClusterRole that is needed")
	_ = cmd.MarkFlagFilename("kubeconfig")
	_ = cmd.RegisterFlagCompletionFunc("by", cobra.FixedCompletions([]string{migrate.ByAPI, migrate.ByPatch}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// migrationProgress shows on a terminal how many objects of which resource are done.
func migrationProgress(w io.Writer) (progress func(string, int), done func()) {
	show, done := progressOn(w, "objects")
	if show == nil {
		return nil, done
	}
	return func(_ string, n int) { show(int64(n), 0) }, done
}

func printMigrated(w io.Writer, r *migrate.Result) {
	for _, m := range r.Resources {
		switch {
		case r.By == migrate.ByAPI && r.DryRun:
			fmt.Fprintf(w, "%s: a StorageVersionMigration would write them again\n", seal.OneLine(m.Name, 100))
		case r.By == migrate.ByAPI:
			fmt.Fprintf(w, "%s: written again by StorageVersionMigration\n", seal.OneLine(m.Name, 100))
		case r.DryRun:
			fmt.Fprintf(w, "%s: %s would be patched\n", seal.OneLine(m.Name, 100), counted(m.Objects, "object"))
		default:
			fmt.Fprintf(w, "%s: %s written again where needed%s\n", seal.OneLine(m.Name, 100), counted(m.Objects, "object"), meanwhile(m))
		}
	}
	if r.DryRun {
		fmt.Fprintf(w, "\n# the user in the kubeconfig needs:\n%s", r.ClusterRole)
		return
	}
	fmt.Fprintln(w, "see with kleidi usage whether anything is left under another key")
}

func meanwhile(m migrate.Migrated) string {
	var all []string
	if m.Conflicts > 0 {
		all = append(all, fmt.Sprintf("%d tried again after a conflict", m.Conflicts))
	}
	if m.Gone > 0 {
		all = append(all, fmt.Sprintf("%d deleted meanwhile", m.Gone))
	}
	if len(all) == 0 {
		return ""
	}
	return " (" + strings.Join(all, ", ") + ")"
}
