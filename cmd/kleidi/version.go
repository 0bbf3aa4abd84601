package main

import (
	"fmt"
	"io"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/hsm"
)

// buildVersion is set by the linker to the release's version.
var buildVersion string

// version is the release, or the revision that this was built from.
func version() string {
	if buildVersion != "" {
		return buildVersion
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return "devel-" + s.Value[:min(12, len(s.Value))]
		}
	}
	return "devel"
}

func (a *app) newVersion() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Show the version, and whether it was built with PKCS#11",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := struct {
				Version string `json:"version"`
				Go      string `json:"go"`
				OS      string `json:"os"`
				Arch    string `json:"arch"`
				PKCS11  bool   `json:"pkcs11"`
			}{version(), runtime.Version(), runtime.GOOS, runtime.GOARCH, hsm.Available}
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
