package main

import (
	"encoding/json"
	"io"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

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

// check refuses wrong global flags before a verb touches the machine.
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
func show[T any](cmd *cobra.Command, a *app, result T, print func(io.Writer, T)) error {
	return a.show(cmd.OutOrStdout(), result, func(w io.Writer) { print(w, result) })
}

// show is as the function above, for a text that needs more than the result.
func (a *app) show(w io.Writer, result any, text func(io.Writer)) error {
	if a.output == "json" {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(result)
	}
	text(w)
	return nil
}

// group returns a command that only has subcommands.
func group(use, short, long string, verbs ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{
		Use: use, Short: short, Long: long,
		Args: noVerb, RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(verbs...)
	return cmd
}

// required demands flags.
func required(cmd *cobra.Command, flags ...string) {
	for _, flag := range flags {
		_ = cmd.MarkFlagRequired(flag) // the flag exists
	}
}

// fileFlags completes flags with the names of files.
func fileFlags(cmd *cobra.Command, flags ...string) {
	for _, flag := range flags {
		_ = cmd.MarkFlagFilename(flag)
	}
}

// noVerb refuses the arguments of a command that has subcommands: an argument can only be
// a misspelt subcommand. The hint names the nearest ones.
func noVerb(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	hint := cmd.CommandPath() + " --help lists them"
	if cmd.SuggestionsMinimumDistance = 2; len(cmd.SuggestionsFor(args[0])) > 0 {
		hint = "did you mean " + strings.Join(cmd.SuggestionsFor(args[0]), " or ") + "?"
	}
	return seal.Errorf("", hint, "unknown command %q for %q", args[0], cmd.CommandPath())
}

// explainArguments makes the commands say in kleidi's words which arguments and flags they take.
func explainArguments(cmd *cobra.Command) {
	for _, sub := range cmd.Commands() {
		explainArguments(sub)
	}
	if accepts := cmd.Args; accepts != nil && !cmd.HasSubCommands() {
		cmd.Args = func(cmd *cobra.Command, args []string) error {
			if accepts(cmd, args) == nil {
				return excludeEachOther(cmd)
			}
			return seal.Errorf("", "see "+cmd.CommandPath()+" --help", "the command is %s, and it got %s", cmd.UseLine(), seal.Count(len(args), "argument"))
		}
	}
}

// excludeEachOther reports flags that were given together and exclude each other.
func excludeEachOther(cmd *cobra.Command) error {
	together := map[string][]string{}
	cmd.Flags().Visit(func(f *pflag.Flag) {
		for _, group := range f.Annotations["cobra_annotation_mutually_exclusive"] {
			together[group] = append(together[group], "--"+f.Name)
		}
	})
	for _, group := range slices.Sorted(maps.Keys(together)) {
		if flags := together[group]; len(flags) > 1 {
			return seal.Errorf("", "give one of them", "%s exclude each other", strings.Join(flags, " and "))
		}
	}
	return nil
}
