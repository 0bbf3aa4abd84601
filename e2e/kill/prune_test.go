package kill

import (
	"context"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/beezy-dev/kleidi/internal/usage/usagetest"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// TestPruneKilled kills serve, and then the command, before each step of a prune. At
// every moment the retired KEK is in the keyring or in the archive, and the command can
// be run again.
func TestPruneKilled(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.configure("")
	recipient := m.identity()
	m.Reboot(usual)
	m.run("init --recovery-recipient " + recipient)
	old := m.show().Current.KeyID
	m.run("rotate")
	start := m.off(usual)
	verb := "prune " + old + " --etcd " + usagetest.StartEtcd(t.Cleanup, usagetest.Change{Key: "/registry/secrets/a/b", Value: usagetest.Encrypted("kleidi", "k1-other")}).URL + " --yes"
	for _, by := range []string{"serve", "command"} {
		steps := 0
		for killed := true; killed; steps++ {
			m.restore(start)
			killed = m.pruneKilled(t, verb, by, victim{onDisk, steps + 1})
			m.holdsSomewhere(t, old)
			m.run("keyring verify")
			m.pruneAgain(t, verb, old)
			if t.Failed() {
				t.Fatalf("the %s was killed: %v, before step %d", by, killed, steps+1)
			}
		}
		if steps < 5 {
			t.Errorf("the %s was killed before %d steps; are system calls still recognised?", by, steps-1)
		}
		t.Logf("the %s was killed before each of %d steps", by, steps-1)
	}
}

// pruneKilled runs serve, with calls as from kube-apiserver, and the command. One of the
// two is killed before a step.
func (m *machine) pruneKilled(t *testing.T, verb, by string, who victim) (killed bool) {
	t.Helper()
	c := m.client(newHistory())
	defer c.conn.Close()
	if by == "command" {
		p := release(t, m.path("serve.log"), m.command("serve"))
		m.waitOpen(c, p)
		command := trace(t, m.stateDir(), m.path("output"), who, m.command(verb))
		ok := command.wait()
		if _, killed = command.reached(); !killed && !ok {
			t.Errorf("kleidi %s: %s", verb, command.said())
		}
		p.signal(unix.SIGTERM)
		p.wait()
		return killed
	}
	p := trace(t, m.stateDir(), m.path("serve.log"), victim{}, m.command("serve"))
	m.waitOpen(c, p)
	p.arm(who)
	_, err := m.try(verb)
	_, killed = p.reached()
	if err != nil && !killed {
		t.Errorf("serve was not killed: %v\n%s", err, p.said())
	}
	p.signal(unix.SIGTERM)
	p.wait()
	return killed
}

// pruneAgain finishes the interrupted prune, and runs serve on the result.
func (m *machine) pruneAgain(t *testing.T, verb, old string) {
	t.Helper()
	p := release(t, m.path("serve.log"), m.command("serve"))
	c := m.client(newHistory())
	defer c.conn.Close()
	m.waitOpen(c, p)
	if _, err := m.try(verb); err != nil && !strings.Contains(err.Error(), "does not belong to a retired KEK") {
		t.Errorf("run again: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := c.decrypts(ctx); err != nil {
		t.Error(err)
	}
	p.signal(unix.SIGTERM)
	p.wait()
	if slices.Contains(m.show().ids(), old) {
		t.Error("the retired KEK is still in the keyring")
	}
	m.holdsSomewhere(t, old)
}

// holdsSomewhere reports whether the KEK is in the stored keyring or in the archive.
func (m *machine) holdsSomewhere(t *testing.T, id string) {
	t.Helper()
	var found []string
	for name, b := range m.files("state") {
		switch {
		case name == "keyring.json":
			u, err := keyring.Parse(b)
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			for _, r := range u.Info().Retired {
				if string(r.KeyID) == id {
					found = append(found, name)
				}
			}
		case strings.HasPrefix(name, "archive-") && !strings.HasSuffix(name, ".new"):
			u, err := keyring.ParseArchive(b)
			if err != nil || string(u.Info().KeyID) != id {
				t.Errorf("%s: %v", name, err)
				continue
			}
			found = append(found, name)
		}
	}
	if len(found) == 0 {
		t.Errorf("the KEK %s is lost", id)
	}
}
