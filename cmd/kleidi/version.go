package main

import (
	"fmt"
	"io"
	"runtime"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/hsm"
	"github.com/beezy-dev/kleidi/internal/version"
)

func newVersion(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Show the version, and whether it was built with PKCS#11",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := shownVersion{version.String(), runtime.Version(), runtime.GOOS, runtime.GOARCH, hsm.Available}
			with := "without"
			if v.PKCS11 {
				with = "with"
			}
			return a.show(cmd.OutOrStdout(), v, func(w io.Writer) {
				fmt.Fprintf(w, "kleidi %s (%s, %s/%s, %s PKCS#11)\n", v.Version, v.Go, v.OS, v.Arch, with)
			})
		},
	}
}
