package main

import (
	"cmp"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/internal/encryptionconfig"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/seal"
)

// moving holds the flags that move a cluster to kleidi, or from kleidi to another
// provider.
type moving struct {
	from, to, source string
	step             int
}

func (m *moving) addFlags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&m.from, "from", "", "the EncryptionConfiguration that kube-apiserver has now (default none: everything is stored in the clear)")
	f.StringVar(&m.to, "to", "kleidi", "the provider to move to: kleidi, identity, aescbc, aesgcm, secretbox, or kms:NAME for another plugin")
	f.StringVar(&m.source, "provider-from", "", "take that provider, with its keys, from this EncryptionConfiguration")
	f.IntVar(&m.step, "step", 0, "write this step, 1 to 3, to --file (default --from)")
	fileFlags(cmd, "from", "provider-from")
	completeOneOf(cmd, "to", "kleidi", "identity", "aescbc", "aesgcm", "secretbox")
	completeOneOf(cmd, "step", "1", "2", "3")
}

// asked reports whether the flags name a move.
func (m *moving) asked() bool {
	return m.from != "" || m.step != 0 || m.source != "" || m.to != "kleidi"
}

// run shows the steps of a move, or writes one of them.
func (m *moving) run(cmd *cobra.Command, a *app, file string, resources []string) error {
	if _, err := os.Stat(file); m.from == "" && err == nil {
		m.from = file
	}
	file = cmp.Or(file, m.from)
	if m.from != "" && cmd.Flags().Changed("resources") {
		return seal.Errorf("", "leave --resources out; to encrypt more resources, add them to that file", "the resources of %s are kept", m.from)
	}
	c, err := a.config()
	if err != nil {
		return err
	}
	own, err := encryptionConfigOf(cmd, c, resources)
	if err != nil {
		return err
	}
	to, err := encryptionconfig.ParseTarget(m.to, encryptionconfig.Kleidi(c.KMS.Name, c.KMS.Socket))
	if err != nil {
		return err
	}
	r, err := encryptionconfig.Take(encryptionconfig.Options{From: m.from, Own: own, To: to, Source: m.source, Step: m.step, File: file, Config: a.configPath})
	if err != nil {
		return files.HintRoot(err)
	}
	if r.Skipped() {
		fmt.Fprintln(cmd.ErrOrStderr(), "warning: step 1 was left out: with several kube-apiservers, one that still runs with the former file can't read what another one writes")
	}
	return a.show(cmd.OutOrStdout(), r, func(w io.Writer) { r.Print(w, m.from) })
}
