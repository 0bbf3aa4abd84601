package main

import (
	"context"
	"crypto/fips140"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/text"
	"github.com/beezy-dev/kleidi/seal"
)

// errEnforced explains the refusal. Without it the libraries would panic in that mode,
// and the message would blame the TPM.
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

// newRootOf returns the command with all verbs. Before any of them runs, the process is
// hardened, since each may come to hold a secret. Only version runs under fips140=only, so
// that a refused program can still be identified.
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
	explainArguments(root)
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return seal.WithHint(err, "see "+cmd.CommandPath()+" --help")
	})
	return root
}

// run executes the command line and returns the exit code: 0, 1 for an error, or the code
// of an exitError whose result is already printed. A result that can't be written is an
// error although the verb succeeded: a script must not take a truncated result for the
// whole. With -o json the error also goes to standard output, unless a part of a result is
// there.
func run(ctx context.Context, out *results, stderr io.Writer, args []string) int {
	a := &app{}
	root := newRootOf(a)
	root.SetArgs(args)
	root.SetOut(out)
	cmd, err := root.ExecuteContextC(ctx)
	if out.err != nil && errors.Is(err, out.err) {
		err = nil // the verb succeeded; only its output failed
	}
	if out.err != nil {
		err = errors.Join(err, fmt.Errorf("the result could not be written to standard output: %w; %s", out.err, afterwards(cmd, err)))
	}
	if err == nil {
		return 0
	}
	if exit, ok := errors.AsType[*exitError](err); ok && exit.err == nil && out.err == nil {
		return exit.code
	}
	if a.output == "json" && !out.written {
		e := json.NewEncoder(out)
		e.SetIndent("", "  ")
		_ = e.Encode(failure{admin.ProblemOf(err)}) // standard error shows it too
	}
	text.Error(stderr, err)
	return 1
}
