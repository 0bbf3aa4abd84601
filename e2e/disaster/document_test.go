package disaster

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/e2e/threenodes"
)

const document = "../../docs/disaster-recovery.md"

// manual holds the document's commands by the name in the comment before them, and
// records which of them were run.
type manual struct {
	commands map[string]string
	ran      map[string]bool
}

var block = regexp.MustCompile("(?s)<!-- (run|not run): ([^\n]*) -->\n```sh\n(.*?)```\n")

func readManual(t *testing.T) *manual {
	t.Helper()
	b, err := os.ReadFile(document)
	must(t, err)
	m := &manual{commands: map[string]string{}, ran: map[string]bool{}}
	all := block.FindAllStringSubmatch(string(b), -1)
	for _, found := range all {
		if found[1] == "run" {
			m.commands[found[2]] = found[3]
		}
	}
	if n := strings.Count(string(b), "```sh\n"); n != len(all) {
		t.Fatalf("%s has %d blocks of commands, of which %d say whether they are run", document, n, len(all))
	}
	return m
}

// allRan demands that each command of the document was run.
func (m *manual) allRan(t *testing.T) {
	t.Helper()
	for name := range m.commands {
		if !m.ran[name] {
			t.Errorf("%s: no disaster ran the commands %q", document, name)
		}
	}
}

// follow runs the commands of the document with that name on a machine, in a folder for its
// administrator. The exit code of the last one must be code.
func (c *controlPlane) follow(t *testing.T, m *machine, name string, code int, env ...string) string {
	t.Helper()
	commands, ok := c.manual.commands[name]
	if !ok {
		t.Fatalf("%s has no commands %q", document, name)
	}
	c.manual.ran[name] = true
	t.Logf("%s: %s", m.Name, name)
	bin := m.Path("bin")
	must(t, os.MkdirAll(bin, 0o700))
	on := strings.Join(m.Host.Command(), " ")
	for program, script := range map[string]string{
		"kleidi":  fmt.Sprintf("exec %s %s --config %s \"$@\"", on, node.Binary(t), m.Path("config.yaml")),
		"sudo":    "exec \"$@\"",
		"etcdutl": fmt.Sprintf("exec %s \"$@\"", threenodes.Binaries["etcdutl"]),
	} {
		must(t, os.WriteFile(filepath.Join(bin, program), []byte("#!/bin/sh\n"+script+"\n"), 0o700))
	}
	for from, to := range map[string]string{"/media/usb/": c.usb + "/", "/var/lib/kleidi/": m.Path("state") + "/"} {
		commands = strings.ReplaceAll(commands, from, to)
	}
	cmd := exec.Command("bash", "-euo", "pipefail", "-c", commands)
	cmd.Dir = m.Dir()
	cmd.Env = append(append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH")), env...)
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != code {
		t.Fatalf("%s:\n%s\n%v, want exit code %d\n%s", name, commands, err, code, out)
	}
	return string(out)
}
