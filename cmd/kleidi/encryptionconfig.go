package main

import (
	"fmt"
	"io"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver"
	"github.com/beezy-dev/kleidi/internal/ownership"
)

const encryptionConfig = `apiVersion: apiserver.config.k8s.io/v1
kind: EncryptionConfiguration
resources:
  - resources:
%s    providers:
      - kms:
          apiVersion: v2
          name: %s
          endpoint: unix://%s
          timeout: 3s
      # reads what was stored before encryption was switched on; remove it once
      # all stored objects are rewritten
      - identity: {}
`

func newEncryptionConfig(a *app) *cobra.Command {
	var resources []string
	cmd := &cobra.Command{
		Use:   "encryption-config",
		Short: "Print the EncryptionConfiguration for this node's kube-apiserver",
		Long: `Print the EncryptionConfiguration for this node's kube-apiserver. Save it to a file,
and name the file in kube-apiserver's --encryption-provider-config.`,
		Example: "  kleidi encryption-config > /etc/kubernetes/encryption.yaml",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
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
			var list strings.Builder
			for _, r := range resources {
				fmt.Fprintf(&list, "      - %s\n", r)
			}
			result := map[string]any{"name": c.KMS.Name, "endpoint": "unix://" + c.KMS.Socket, "resources": resources}
			return a.show(cmd.OutOrStdout(), result, func(w io.Writer) { fmt.Fprintf(w, encryptionConfig, list.String(), c.KMS.Name, c.KMS.Socket) })
		},
	}
	cmd.Flags().StringSliceVar(&resources, "resources", []string{"secrets"}, "what to encrypt")
	return cmd
}
