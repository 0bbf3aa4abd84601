package main

import (
	"fmt"
	"io"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver"
	"github.com/beezy-dev/kleidi/internal/encryptionconfig"
	"github.com/beezy-dev/kleidi/internal/ownership"
)

func newEncryptionConfig(a *app) *cobra.Command {
	var resources []string
	cmd := &cobra.Command{
		Use:   "encryption-config",
		Short: "Print the EncryptionConfiguration for this node's kube-apiserver",
		Long: `Print the EncryptionConfiguration for this node's kube-apiserver. Save it to a file,
and name the file in kube-apiserver's --encryption-provider-config.`,
		Example: "  kleidi encryption-config > /etc/kubernetes/kleidi-encryption.yaml",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := encryptionconfig.CheckResources(resources); err != nil {
				return err
			}
			c, err := a.config()
			if err != nil {
				return err
			}
			if err := grpcserver.CheckSocket(c.KMS.Socket); err != nil {
				return err
			}
			if above := ownership.StickyAbove(filepath.Dir(c.KMS.Socket)); above != "" {
				fmt.Fprintf(cmd.ErrOrStderr(), "warning: kms.socket lies below %s, in which every user may make entries: after a reboot another user could make its folder first, and answer kube-apiserver; choose a path below /run\n", above)
			}
			result := encryptionconfig.New(c.KMS.Name, c.KMS.Socket, resources)
			return a.show(cmd.OutOrStdout(), result, func(w io.Writer) { fmt.Fprint(w, result.YAML()) })
		},
	}
	cmd.Flags().StringSliceVar(&resources, "resources", []string{"secrets"}, "what to encrypt")
	return cmd
}
