package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/seal"
)

// results is standard output. It remembers the first failed write, so that no verb
// needs to check each of its lines.
type results struct {
	file    *os.File
	written bool
	err     error
}

// Write implements io.Writer.
func (r *results) Write(b []byte) (int, error) {
	if r.err != nil {
		return 0, r.err
	}
	r.written = r.written || len(b) > 0
	n, err := r.file.Write(b)
	r.err = err
	return n, err
}

// exitError ends the program with its own exit code. Err is nil if the results have
// told everything.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return ""
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// run executes the command line and returns the exit code.
func run(ctx context.Context, out *results, stderr io.Writer, args []string) int {
	a := &app{}
	root := newRootOf(a)
	root.SetArgs(args)
	root.SetOut(out)
	cmd, err := root.ExecuteContextC(ctx)
	if out.err != nil && errors.Is(err, out.err) {
		err = nil // the verb failed only at this
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
		_ = e.Encode(failure{admin.ProblemOf(err)}) // standard error has it too
	}
	printError(stderr, err)
	return 1
}

// printError gives each detail of a refusal, and then its hint, a line of its own.
func printError(w io.Writer, err error) {
	p := admin.ProblemOf(err)
	if len(p.Details) == 0 {
		fmt.Fprintln(w, "error:", err)
		return
	}
	fmt.Fprintf(w, "error: %s:\n  %s\n", p.Message, strings.Join(p.Details, "\n  "))
	if p.Hint != "" {
		fmt.Fprintln(w, "  ->", p.Hint)
	}
}

// failure is printed with -o json in place of a verb's result.
type failure struct {
	Error *admin.Problem `json:"error"`
}

// reading are the verbs that change nothing but the file that they are told to write.
var reading = []string{
	"bootpolicy check", "bootpolicy diff", "bootpolicy evidence", "bootpolicy explain", "bootpolicy record", "bootpolicy show",
	"bootstate list", "bootstate sign", "completion bash", "completion fish", "completion powershell", "completion zsh",
	"doctor", "encryption-config", "help", "keyring backup", "keyring check", "keyring export", "keyring show", "keyring verify", "node identity", "node list", "slot list", "slot test", "status", "usage",
	"verifier show", "version",
}

// afterwards says what a verb has changed although its result is lost.
func afterwards(cmd *cobra.Command, err error) string {
	verb := strings.TrimPrefix(cmd.CommandPath(), cmd.Root().Name()+" ")
	switch {
	case err == nil && (verb == "keyring backup" || verb == "keyring export" || flagValue(cmd, "file") != "" || flagValue(cmd, "out") != ""):
		return "the file was written, so that the command need not be run again"
	case flagValue(cmd, "dry-run") == "true":
		return "nothing was changed"
	case verb == "kubeadm patch" && flagValue(cmd, "dir") == "" && flagValue(cmd, "apply") != "true" && flagValue(cmd, "revert") != "true":
		return "nothing was changed"
	case slices.Contains(reading, verb) || verb == cmd.Root().Name():
		return "nothing was changed"
	case err != nil:
		return "see with kleidi status what was changed"
	case strings.HasPrefix(verb, "verifier "):
		return "the change was made, so that the command need not be run again; see kleidi verifier show"
	}
	return "the change was made, so that the command need not be run again; see kleidi status"
}

func flagValue(cmd *cobra.Command, name string) string {
	if f := cmd.Flags().Lookup(name); f != nil {
		return f.Value.String()
	}
	return ""
}

// noVerb refuses the arguments of a command that only has subcommands: none, or a
// misspelt one.
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
