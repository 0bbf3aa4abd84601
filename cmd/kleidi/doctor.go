package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/doctor"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/kubeadm"
	"github.com/beezy-dev/kleidi/internal/operation"
	"github.com/beezy-dev/kleidi/internal/version"
)

func newDoctor(a *app) *cobra.Command {
	n := doctor.Node{Version: version.String()}
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Look this node over: what is wrong, why it matters, and what mends it",
		Long: `Look this node over: the TPM, the keyslots, the running kleidi serve, kube-apiserver's
EncryptionConfiguration and manifest, memory, and hooks for updates. Nothing is changed.

The exit code is 0 if nothing must be mended, 4 if something must, and 1 if the checks
could not be made.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if n.Config, err = a.config(); err != nil {
				return err
			}
			_, err = admin.Dial(cmd.Context(), n.Config.Admin.Socket)
			if n.Serving = err == nil; err != nil && !errors.Is(err, admin.ErrNotRunning) {
				return files.HintRoot(err)
			}
			if n.Status, err = operate(cmd.Context(), a, operation.Status, admin.StatusRequest{Try: admin.TryTPM}); err != nil {
				return files.HintRoot(err)
			}
			r := n.Examine()
			if err := a.show(cmd.OutOrStdout(), r, func(w io.Writer) { printDoctor(w, r) }); err != nil {
				return err
			}
			if !r.Healthy() {
				return &exitError{code: exitProblem}
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&n.EncryptionConfig, "encryption-config", defaultEncryptionConfig, "kube-apiserver's EncryptionConfiguration")
	cmd.Flags().StringVar(&n.Manifest, "manifest", kubeadm.Manifest, "the manifest of kube-apiserver, if kubeadm runs it")
	_ = cmd.MarkFlagFilename("encryption-config", "yaml")
	_ = cmd.MarkFlagFilename("manifest", "yaml")
	return cmd
}

func printDoctor(w io.Writer, r doctor.Report) {
	for _, f := range r.Findings {
		level := "PROBLEM"
		if f.Note {
			level = "note"
		}
		fmt.Fprintf(w, "%-8s %s: %s\n         why: %s\n         -> %s\n", level, f.Check, f.What, f.Why, f.Command)
	}
	fmt.Fprintf(w, "%d checks, %d findings\n", len(r.Checks), len(r.Findings))
}
