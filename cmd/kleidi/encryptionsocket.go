package main

import (
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/encryptionconfig"
	"github.com/beezy-dev/kleidi/internal/ownership"
)

// encryptionConfigOf returns the EncryptionConfiguration for this node. It refuses a
// socket that can't work, and warns about a path that another user could occupy.
func encryptionConfigOf(cmd *cobra.Command, c *config.Config, resources []string) (e encryptionconfig.EncryptionConfiguration, err error) {
	if err := grpcserver.CheckSocket(c.KMS.Socket); err != nil {
		return e, err
	}
	if above := ownership.StickyAbove(filepath.Dir(c.KMS.Socket)); above != "" {
		fmt.Fprintf(cmd.ErrOrStderr(), "warning: kms.socket is below %s, in which every user may make entries: after a reboot another user could make its folder first, and answer kube-apiserver; choose a path below /run\n", above)
	}
	return encryptionconfig.New(c.KMS.Name, c.KMS.Socket, resources), nil
}
