package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/encryptionconfig"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/ownership"
	"github.com/beezy-dev/kleidi/seal"
)

func newEncryptionConfig(a *app) *cobra.Command {
	var resources []string
	var file string
	cmd := &cobra.Command{
		Use:   "encryption-config",
		Short: "Print the EncryptionConfiguration for this node's kube-apiserver",
		Long: `Print the EncryptionConfiguration for this node's kube-apiserver, or write it with
--file. Name the file in kube-apiserver's --encryption-provider-config.`,
		Example: "  kleidi encryption-config --file " + defaultEncryptionConfig,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := encryptionconfig.CheckResources(resources); err != nil {
				return err
			}
			c, err := a.config()
			if err != nil {
				return err
			}
			result, err := encryptionConfigOf(cmd, c, resources)
			if err == nil && file != "" {
				err = writeEncryptionConfig(file, result)
			}
			if err != nil {
				return err
			}
			return a.show(cmd.OutOrStdout(), result, func(w io.Writer) {
				if file == "" {
					fmt.Fprint(w, result.YAML())
				} else {
					fmt.Fprintf(w, "%s written\n", file)
				}
			})
		},
	}
	cmd.Flags().StringSliceVar(&resources, "resources", []string{"secrets"}, "what to encrypt")
	cmd.Flags().StringVar(&file, "file", "", "write it to this file, with the folders above it; another file there is kept, and refused")
	_ = cmd.MarkFlagFilename("file", "yaml")
	return cmd
}

func encryptionConfigOf(cmd *cobra.Command, c *config.Config, resources []string) (e encryptionconfig.EncryptionConfiguration, err error) {
	if err := grpcserver.CheckSocket(c.KMS.Socket); err != nil {
		return e, err
	}
	if above := ownership.StickyAbove(filepath.Dir(c.KMS.Socket)); above != "" {
		fmt.Fprintf(cmd.ErrOrStderr(), "warning: kms.socket lies below %s, in which every user may make entries: after a reboot another user could make its folder first, and answer kube-apiserver; choose a path below /run\n", above)
	}
	return encryptionconfig.New(c.KMS.Name, c.KMS.Socket, resources), nil
}

// writeEncryptionConfig writes a file that does not exist, or says the same.
func writeEncryptionConfig(file string, e encryptionconfig.EncryptionConfiguration) error {
	if err := checkEncryptionConfig(file, e); err != nil {
		return err
	}
	return files.HintRoot(files.WriteOver(file, []byte(e.YAML())))
}

func checkEncryptionConfig(file string, e encryptionconfig.EncryptionConfiguration) error {
	there, err := files.Read(file, maxEncryptionConfig)
	switch {
	case errors.Is(err, fs.ErrNotExist) || err == nil && bytes.Equal(there, []byte(e.YAML())):
		return nil
	case err != nil:
		return files.HintRoot(err)
	}
	return seal.Errorf("", "add kleidi's provider to it by hand, or name another file; kleidi encryption-config prints it", "%s exists and says something else", file)
}

// maxEncryptionConfig bounds an EncryptionConfiguration, in bytes.
const maxEncryptionConfig = 1 << 20
