package main

import (
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
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

// exitError ends the program with its own exit code. Err is nil if the printed results
// say everything.
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

// failure is printed with -o json in place of a verb's result.
type failure struct {
	Error *admin.Problem `json:"error"`
}

// reading are the verbs that change nothing except the file that they are told to write.
var reading = []string{
	"bootpolicy check", "bootpolicy diff", "bootpolicy evidence", "bootpolicy explain", "bootpolicy record", "bootpolicy show",
	"bootstate list", "bootstate sign", "completion bash", "completion fish", "completion powershell", "completion zsh",
	"doctor", "encryption-config", "help", "keyring backup", "keyring check", "keyring export", "keyring show", "keyring verify", "node identity", "node list", "slot list", "slot test", "status", "usage",
	"verifier show", "version",
}

// afterwards describes the change that a verb made although its result is lost.
func afterwards(cmd *cobra.Command, err error) string {
	verb := strings.TrimPrefix(cmd.CommandPath(), cmd.Root().Name()+" ")
	switch {
	case flagValue(cmd, "help") == "true" || cmd.HasSubCommands() && verb != "verifier": // it only showed its help
		return "nothing was changed"
	case err == nil && (verb == "keyring backup" || verb == "keyring export" || verb == "keyring archive" || flagValue(cmd, "file") != "" || strings.Trim(flagValue(cmd, "step"), "0") != "" || flagValue(cmd, "out") != ""):
		return "the file was written; there is no need to run the command again"
	case flagValue(cmd, "dry-run") == "true":
		return "nothing was changed"
	case verb == "kubeadm patch" && flagValue(cmd, "dir") == "" && flagValue(cmd, "apply") != "true" && flagValue(cmd, "revert") != "true":
		return "nothing was changed"
	case slices.Contains(reading, verb):
		return "nothing was changed"
	case err != nil:
		return "run kleidi status to see what was changed"
	case strings.HasPrefix(verb, "verifier "):
		return "the change was made; there is no need to run the command again; see kleidi verifier show"
	}
	return "the change was made; there is no need to run the command again; see kleidi status"
}

func flagValue(cmd *cobra.Command, name string) string {
	if f := cmd.Flags().Lookup(name); f != nil {
		return f.Value.String()
	}
	return ""
}
