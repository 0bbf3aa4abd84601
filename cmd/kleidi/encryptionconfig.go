package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/internal/encryptionconfig"
	"github.com/beezy-dev/kleidi/internal/kubeadm"
)

func newEncryptionConfig(a *app) *cobra.Command {
	var resources []string
	var file string
	var m moving
	cmd := &cobra.Command{
		Use:   "encryption-config",
		Short: "Print the EncryptionConfiguration for this node's kube-apiserver",
		Long: `Print the EncryptionConfiguration for this node's kube-apiserver, or write it with
--file. Name the file in kube-apiserver's --encryption-provider-config.

With --from or --to the command takes a cluster from the providers that it has to another
one, in three steps: with step 1 kube-apiserver also reads with the next provider, with
step 2 it writes with it, and with step 3 the former providers are gone. Without --step it
shows the steps. With --step it writes one of them, keeps a copy of the former file, and
says what to wait for before the next. A step can be taken back by writing the former one.`,
		Example: "  kleidi encryption-config --file " + kubeadm.DefaultEncryptionConfig + `

  # from aescbc to kleidi: show the steps, then write the first
  kleidi encryption-config --from /etc/kubernetes/encryption.yaml
  kleidi encryption-config --from /etc/kubernetes/encryption.yaml --step=1

  # out again
  kleidi encryption-config --from /etc/kubernetes/encryption.yaml --to=secretbox --step=1`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := encryptionconfig.CheckResources(resources); err != nil {
				return err
			}
			if m.asked() {
				return m.run(cmd, a, file, resources)
			}
			c, err := a.config()
			if err != nil {
				return err
			}
			result, err := encryptionConfigOf(cmd, c, resources)
			if err == nil && file != "" {
				err = result.WriteNew(file)
			}
			if err != nil {
				return err
			}
			return a.show(cmd.OutOrStdout(), result, func(w io.Writer) {
				if file == "" {
					fmt.Fprint(w, result.YAML())
				} else {
					fmt.Fprintf(w, "%s written\nnext: name it in kube-apiserver's --encryption-provider-config; with kubeadm: %s\n", file, kubeadm.ApplyCommand(file, a.configPath))
				}
			})
		},
	}
	m.addFlags(cmd)
	cmd.Flags().StringSliceVar(&resources, "resources", []string{"secrets"}, "what to encrypt, if --from names no file")
	cmd.Flags().StringVar(&file, "file", "", "write it to this file, and make its folders; without --step, an existing file with another content is refused")
	_ = cmd.MarkFlagFilename("file", "yaml")
	return cmd
}
