package main

import (
	"crypto/fips140"
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
		Short: "Show the version, whether PKCS#11 is in it, and the FIPS 140-3 module if FIPS mode is on",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := shownVersion{Version: version.String(), Go: runtime.Version(), OS: runtime.GOOS, Arch: runtime.GOARCH, PKCS11: hsm.Available}
			with, fips := "without", ""
			if v.PKCS11 {
				with = "with"
			}
			if fips140.Enabled() {
				v.FIPS140 = fips140.Version()
				fips = ", FIPS 140-3 module " + v.FIPS140
			}
			return a.show(cmd.OutOrStdout(), v, func(w io.Writer) {
				fmt.Fprintf(w, "kleidi %s (%s, %s/%s, %s PKCS#11%s)\n", v.Version, v.Go, v.OS, v.Arch, with, fips)
			})
		},
	}
}
