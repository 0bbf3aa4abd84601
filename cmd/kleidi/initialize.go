package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/encryptionconfig"
	"github.com/beezy-dev/kleidi/internal/founding"
	"github.com/beezy-dev/kleidi/internal/kubeadm"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/text"
	"github.com/beezy-dev/kleidi/seal"
)

// initFlags are the flags of kleidi init.
type initFlags struct {
	founding.InitOptions
	acceptDataLoss bool
	importFrom     string // config.json of kleidi 1.x
	anchor         string // must equal anchor.store
	// encryptionConfig is the file to write kube-apiserver's EncryptionConfiguration to.
	encryptionConfig string
}

func newInit(a *app) *cobra.Command {
	var f initFlags
	cmd := &cobra.Command{
		Use:   "init",
		Short: "Make a KEK and a keyring, and seal the KEK to this machine's TPM",
		Long: `Make a KEK and a keyring, and seal the KEK to this machine's TPM and to its present
boot state. The command never touches an existing keyring.

The KEK also gets a recovery slot, for the day when the TPM does not open. The
command shows the recovery identity once, and asks you to type it. With
--recovery-recipient it makes the slot for an age public key whose identity you keep
elsewhere.`,
		Example: `  kleidi init
  kleidi init --recovery-recipient age1… --encryption-config /etc/kubernetes/kleidi-encryption.yaml`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := f.check(a); err != nil {
				return err
			}
			return a.runInit(cmd, &f)
		},
	}
	flags := cmd.Flags()
	flags.StringArrayVar(&f.Recipients, "recovery-recipient", nil, "age public key (age1…) to make the recovery slot for; may be repeated")
	flags.BoolVar(&f.BreakTwoOfTwo, "break-two-of-two", false, "make the recovery slot although it alone opens the KEK, for which unlock.order demands two wrappers")
	flags.StringVar(&f.importFrom, "import-config", "", "config.json of kleidi 1.x: its token and key also wrap the KEK")
	_ = cmd.MarkFlagFilename("import-config", "json")
	flags.BoolVar(&f.GenerateKey, "generate-key", false, "first generate the key in the configured token: AES-256, sensitive, not extractable")
	flags.StringVar(&f.encryptionConfig, "encryption-config", "", "also write kube-apiserver's EncryptionConfiguration of Secrets to this file, and make its folders")
	_ = cmd.MarkFlagFilename("encryption-config", "yaml")
	flags.StringVar(&f.anchor, "anchor", "", "where to keep the anchor: file or tpm; must equal anchor.store (default anchor.store)")
	completeOneOf(cmd, "anchor", "file", "tpm")
	flags.BoolVar(&f.NoRecovery, "no-recovery", false, "make no recovery slot: if the TPM or the machine fails, all Secrets are lost")
	flags.BoolVar(&f.acceptDataLoss, "accept-data-loss", false, "acknowledge what --no-recovery means")
	return cmd
}

func (f *initFlags) check(a *app) error {
	switch {
	case f.NoRecovery && len(f.Recipients) > 0:
		return seal.Errorf("", "give one of them", "--no-recovery and --recovery-recipient exclude each other")
	case f.NoRecovery && !f.acceptDataLoss:
		return seal.Errorf("", "if that is what you want, add --accept-data-loss", "--no-recovery: if this TPM fails, is cleared, or the machine boots differently, every Secret is lost")
	case f.acceptDataLoss && !f.NoRecovery:
		return seal.Errorf("", "give both, or leave it out", "--accept-data-loss goes with --no-recovery")
	case f.BreakTwoOfTwo && f.NoRecovery:
		return seal.Errorf("", "give one of them", "--break-two-of-two is about the recovery slot, which --no-recovery leaves out")
	case !f.NoRecovery && len(f.Recipients) == 0 && a.output == "json":
		return seal.Errorf("", "add --recovery-recipient age1…", "-o json can't show a recovery identity")
	}
	return nil
}

// configOf returns the configuration, and the token of kleidi 1.x that --import-config
// puts into it.
func (a *app) configOf(importFrom string) (*config.Config, *founding.Import, error) {
	if importFrom == "" {
		cfg, err := a.config()
		return cfg, nil, err
	}
	var i *founding.Import
	cfg, err := a.config(func(c *config.Config) (err error) {
		i, err = founding.ReadImport(importFrom, c)
		return err
	})
	if err != nil && i != nil {
		i.Close()
	}
	return cfg, i, err
}

// runInit checks the anchor and the EncryptionConfiguration that it is to write before the
// keyring exists. From then on an error says that the keyring is made, since a second init
// would refuse. A running serve reads the keyring last.
func (a *app) runInit(cmd *cobra.Command, f *initFlags) error {
	cfg, token, err := a.configOf(f.importFrom)
	if err != nil {
		return err
	}
	if token != nil {
		defer token.Close()
	}
	if f.anchor != "" && f.anchor != cfg.Anchor.Store {
		return seal.Errorf("", "set anchor.store in the configuration, so that kleidi serve demands the same", "--anchor %s: anchor.store is %s", f.anchor, cfg.Anchor.Store)
	}
	var encryption encryptionconfig.EncryptionConfiguration
	if f.encryptionConfig != "" { // checked before the keyring exists
		if encryption, err = encryptionConfigOf(cmd, cfg, []string{"secrets"}); err == nil {
			err = encryption.CheckNew(f.encryptionConfig)
		}
		if err != nil {
			return err
		}
	}
	f.Import, f.Prompter = token, newPerson(cmd)
	f.Progress = func(step string) { fmt.Fprintln(cmd.ErrOrStderr(), "[init]", step) }
	result, err := a.makeKeyring(cmd, cfg, f.InitOptions)
	if err != nil {
		return err
	}
	give := "make kube-apiserver's EncryptionConfiguration: " + kubeadm.EncryptionConfigCommand(a.configPath)
	if f.encryptionConfig != "" {
		if err := encryption.WriteNew(f.encryptionConfig); err != nil {
			return fmt.Errorf("the keyring is made, but not the EncryptionConfiguration: %w", err)
		}
		give = "give kube-apiserver " + f.encryptionConfig + "; with kubeadm: " + kubeadm.ApplyCommand(f.encryptionConfig, a.configPath)
	}
	next := "start kleidi serve (systemctl enable --now kleidi), and "
	if client, err := admin.Dial(cmd.Context(), cfg.Admin.Socket); err == nil {
		next = ""
		if _, err := admin.Call(cmd.Context(), client, admin.Reload, admin.ReloadRequest{}); err != nil {
			return fmt.Errorf("the keyring is made, but the running kleidi serve does not open it: %w", err)
		}
	}
	return a.show(cmd.OutOrStdout(), result, func(w io.Writer) { text.Init(w, result, token, cfg.Unlock.Order, next+give) })
}

// makeKeyring makes the keyring, and returns the state folder to the running serve.
func (a *app) makeKeyring(cmd *cobra.Command, cfg *config.Config, opts founding.InitOptions) (*founding.InitResult, error) {
	n, err := node.New(cfg, logger(cfg), nil)
	if err != nil {
		return nil, err
	}
	defer n.Close()
	result, err := founding.Init(cmd.Context(), n, opts)
	n.NoteSpent(cmd.ErrOrStderr())
	if err != nil {
		return nil, fmt.Errorf("init: %w", err)
	}
	return result, nil
}
