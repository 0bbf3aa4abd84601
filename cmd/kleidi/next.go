package main

import (
	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/operation"
	"github.com/beezy-dev/kleidi/internal/reseal"
	"github.com/beezy-dev/kleidi/seal"
)

func registerNextFiles(cmd *cobra.Command, f *reseal.NextFiles) {
	flags := cmd.Flags()
	for prefix, files := range map[string]*reseal.BootFiles{"next": &f.Next, "running": &f.Running} {
		of := "of the " + prefix + " boot"
		flags.StringVar(&files.Uki, prefix+"-uki", "", "unified kernel image "+of)
		flags.StringVar(&files.Kernel, prefix+"-kernel", "", "kernel "+of+", with GRUB or the kernel's EFI stub")
		flags.StringVar(&files.Initrd, prefix+"-initrd", "", "initrd "+of+", with GRUB or the kernel's EFI stub")
		flags.StringVar(&files.GrubConfig, prefix+"-grub-config", "", "grub.cfg "+of)
	}
	flags.StringVar(&f.CommandLine, "next-cmdline", "", "kernel command line of the next boot, with GRUB or the kernel's EFI stub")
	flags.StringVar(&f.RunningCommandLine, "running-cmdline", "", "kernel command line of the running boot, as in /proc/cmdline")
	flags.StringVar(&f.Dbx, "next-dbx", "", "next content or update of Secure Boot's dbx (dbxupdate_x64.bin)")
}

// nextFilesGiven reports whether a flag of the next boot was given.
func nextFilesGiven(cmd *cobra.Command, f *reseal.NextFiles) bool {
	f.HasLine, f.HasRunningLine = cmd.Flags().Changed("next-cmdline"), cmd.Flags().Changed("running-cmdline")
	return f.Next != reseal.BootFiles{} || f.Dbx != "" || f.HasLine
}

// runningAlone refuses files of the running boot if no next boot is to be predicted.
func runningAlone(cmd *cobra.Command, f *reseal.NextFiles) error {
	if !nextFilesGiven(cmd, f) && (f.Running != reseal.BootFiles{} || f.HasRunningLine) {
		return seal.Errorf("", "name the files of the next boot, or leave it out", "--running-… goes with --next-…, to predict the next boot from")
	}
	return nil
}

// resealNext predicts the next boot state in this process and has the running serve seal
// to it: serve receives PCR values, and reads no file that the operator names. With dryRun
// nothing is sealed.
func (a *app) resealNext(cmd *cobra.Command, f *reseal.NextFiles, req admin.ResealRequest, dryRun bool) (*reseal.NextResult, error) {
	n, err := a.node()
	if err != nil {
		return nil, err
	}
	defer n.Close()
	change, err := f.Change()
	if err != nil {
		return nil, err
	}
	if dryRun {
		return reseal.ToNext(cmd.Context(), n, change, nil)
	}
	return reseal.ToNext(cmd.Context(), n, change, func(next *admin.BootState) (admin.KeyringState, error) {
		req.Next = next
		return operate(cmd.Context(), a, operation.Reseal, req)
	})
}
