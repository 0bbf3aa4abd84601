package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/dev"
	"github.com/beezy-dev/kleidi/tpm/simboot"
)

func newDev(a *app) *cobra.Command {
	var d dev.Dev
	var loader string
	cmd := &cobra.Command{
		Use:   "dev",
		Short: "Run kleidi on a simulated machine: swtpm, measured boot, init, serve",
		Long: `Run kleidi on a simulated machine: a software TPM (swtpm) that boots with measurements
and an event log, as a real machine does. The first run makes a keyring. Each run
serves KMS v2 and checks it through the socket. The folder keeps the machine's state.

To see kleidi refuse a boot, use another --kernel or --command-line, or
--secure-boot=false. NOT for real Secrets: the recovery identity is in the folder.`,
		Example: `  kleidi dev
  kleidi dev --kernel 6.13.1-evil      # another kernel: kleidi stays locked, and says why
  kleidi --config ~/.local/state/kleidi/dev/config.yaml status`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := d.Resolve(simboot.Loader(loader), cmd.Flags().Changed("secure-boot")); err != nil {
				return err
			}
			d.Log = logger
			d.Load = func(path string) (*config.Config, error) {
				own := *a
				own.configPath = path
				return own.config()
			}
			d.Say = func(format string, args ...any) { fmt.Fprintf(cmd.OutOrStdout(), format+"\n", args...) }
			return d.Run(cmd.Context())
		},
	}
	base := simboot.Baseline(simboot.UKI)
	flags := cmd.Flags()
	flags.StringVar(&d.Dir, "dir", "", "the machine's folder (default $XDG_STATE_HOME/kleidi/dev, or ~/.local/state/kleidi/dev)")
	flags.BoolVar(&d.Once, "once", false, "stop after the self-check")
	flags.StringVar(&loader, "loader", string(simboot.UKI), "how the machine boots: uki, grub or efi-stub; direct, which measures nothing, is refused by kleidi init")
	completeOneOf(cmd, "loader", string(simboot.UKI), string(simboot.GRUB), string(simboot.EFIStub), string(simboot.Direct))
	flags.StringVar(&d.Boot.Kernel, "kernel", base.Kernel, "the kernel's version")
	flags.StringVar(&d.Boot.CommandLine, "command-line", base.CommandLine, "the kernel's command line")
	flags.StringVar(&d.Boot.Initrd, "initrd", base.Initrd, "the initrd's content")
	flags.BoolVar(&d.Boot.SecureBoot, "secure-boot", true, "whether Secure Boot is on (efi-stub: off)")
	return cmd
}
