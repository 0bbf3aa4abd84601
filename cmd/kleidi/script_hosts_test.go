package main

import (
	"encoding/json"
	"os"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/beezy-dev/kleidi/internal/members"
)

// on runs a command on another host of the script: on NAME COMMAND ARGS... The first
// command makes the host. Its files are in a folder with its name.
func (h *host) on(ts *testscript.TestScript, args []string) error {
	if len(args) < 2 {
		return broken("on NAME COMMAND")
	}
	f, ok := hostCommands[args[1]]
	if !ok {
		return broken("on: there is no command %q", args[1])
	}
	other, err := h.other(args[0])
	if err != nil {
		return broken("%w", err)
	}
	return f(other, ts, args[2:])
}

func (h *host) other(name string) (*host, error) {
	if other := h.others[name]; other != nil {
		return other, nil
	}
	other := &host{t: h.t, work: h.path(name), name: name, sealed: h.sealed, address: loopback(), others: map[string]*host{}}
	for _, dir := range []string{"", "run", "hw"} {
		if err := os.Mkdir(other.path(dir), 0o700); err != nil {
			return nil, err
		}
	}
	h.others[name] = other
	return other, other.config(nil, nil)
}

// approve approves the host whose output of kleidi node identity -o json is in a file:
// approve NAME FILE FLAGS...
func (h *host) approve(ts *testscript.TestScript, args []string) error {
	b, err := os.ReadFile(h.abs(args[1]))
	if err != nil {
		return broken("%w", err)
	}
	var id members.Identity
	if err := json.Unmarshal(b, &id); err != nil {
		return broken("%w", err)
	}
	return h.kleidi(ts, append([]string{"node", "approve", args[0], "--ek", id.EK}, args[2:]...))
}

// join runs the command in the last line of a file, as kleidi node approve prints it:
// join FILE FLAGS... The file belongs to the script.
func (h *host) join(ts *testscript.TestScript, args []string) error {
	lines := strings.Split(strings.TrimSpace(ts.ReadFile(args[0])), "\n")
	command := strings.Fields(lines[len(lines)-1])
	if len(command) < 2 || command[0] != "kleidi" || command[1] != "join" {
		return broken("%s ends in %q", args[0], command)
	}
	deadline := time.Now().Add(waitTimeout)
	for unanswered := 0; ; {
		err := h.kleidi(ts, append(command[1:], args[1:]...))
		if err == nil || time.Now().After(deadline) {
			return err
		}
		said := ts.ReadFile("stderr")
		switch {
		case strings.Contains(said, "another join of this node is in progress"):
			// the other node learns only a moment later that an earlier join has broken off
		case strings.Contains(said, "check that kleidi serve runs there") && unanswered < 5:
			// the other node cuts off a join that a busy machine slows down; in some scripts it has died
			unanswered++
		default:
			return err
		}
	}
}
