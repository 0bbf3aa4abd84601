package main

import (
	"crypto/fips140"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/seal"
)

// app holds the global flags, which all verbs share.
type app struct {
	configPath string
	output     string
	logLevel   string
}

// errEnforced is better than what the libraries do in that mode: they panic, and the
// message would blame the TPM.
var errEnforced = seal.WithHint(errors.New("GODEBUG=fips140=only forbids AES-CFB, which sessions with a TPM need, and X25519, which recovery identities need"),
	"set GODEBUG=fips140=on")

const example = `  # on a control-plane node: make a KEK and seal it to this machine's TPM
  kleidi init

  # serve it to kube-apiserver (deploy/ holds a systemd unit)
  kleidi serve

  # print the file for kube-apiserver's --encryption-provider-config
  kleidi encryption-config

  # without a TPM: run everything on a simulated machine
  kleidi dev`

func newRoot() *cobra.Command { return newRootOf(&app{}) }

func newRootOf(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:   "kleidi",
		Short: "Encrypt Kubernetes Secrets under a key that is sealed in the TPM",
		Long: `kleidi is a KMS v2 provider for Kubernetes. The key that encrypts Secrets in etcd
is sealed to the control-plane node's TPM and to its boot state. kleidi unseals it only
after it has attested the boot.`,
		Example:       example,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          noVerb,
		RunE:          func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			node.HardenProcess()
			if fips140.Enforced() && cmd.Name() != "version" {
				return errEnforced
			}
			return a.check()
		},
	}
	flags := root.PersistentFlags()
	flags.StringVar(&a.configPath, "config", "", "configuration file (default "+config.DefaultPath+", if it exists)")
	flags.StringVarP(&a.output, "output", "o", "text", "how to show results: text or json")
	flags.StringVar(&a.logLevel, "log-level", "", "debug, info, warn or error; overrides log.level")
	_ = root.MarkPersistentFlagFilename("config", "yaml", "yml")
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"text", "json"}, cobra.ShellCompDirectiveNoFileComp))
	_ = root.RegisterFlagCompletionFunc("log-level", cobra.FixedCompletions([]string{"debug", "info", "warn", "error"}, cobra.ShellCompDirectiveNoFileComp))
	root.AddCommand(
		newInit(a), newServe(a), newStatus(a), newRotate(a), newReseal(a), newSuspend(a), newBootState(a), newSlot(a), newVaultKey(a), newPKCS11PIN(a), newRecover(a), newReset(a), newNode(a), newJoin(a),
		newKubeadm(a), newDoctor(a),
		newCluster(a), newKeyring(a), newBootPolicy(a), newVerifier(a), newEncryptionConfig(a), newDev(a), newVersion(a),
		newUsage(a), newMigrate(a), newPrune(a),
	)
	return root
}

func (a *app) check() error {
	if a.output != "text" && a.output != "json" {
		return seal.Errorf("", "want text or json", "--output %q", a.output)
	}
	var level slog.Level
	if err := level.UnmarshalText([]byte(a.logLevel)); a.logLevel != "" && err != nil {
		return seal.Errorf("", "want debug, info, warn or error", "--log-level %q", a.logLevel)
	}
	return nil
}

// config reads the configuration that the flags name.
func (a *app) config(amend ...func(*config.Config) error) (*config.Config, error) {
	c, err := config.Load(a.configPath, amend...)
	if err == nil && a.logLevel != "" {
		err = c.Log.Level.UnmarshalText([]byte(a.logLevel))
	}
	return c, err
}

// node puts this machine together from the configuration that the flags name.
func (a *app) node() (*node.Node, error) {
	cfg, err := a.config()
	if err != nil {
		return nil, err
	}
	return node.New(cfg, logger(cfg), nil)
}

// logger writes to stderr, so that stdout holds only results.
func logger(c *config.Config) *slog.Logger {
	opts := &slog.HandlerOptions{Level: c.Log.Level}
	if c.Log.Format == "json" {
		return slog.New(slog.NewJSONHandler(os.Stderr, opts))
	}
	return slog.New(slog.NewTextHandler(os.Stderr, opts))
}

// show prints a result in the format that the operator asked for.
func (a *app) show(w io.Writer, result any, text func(io.Writer)) error {
	if a.output == "json" {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(result)
	}
	text(w)
	return nil
}
