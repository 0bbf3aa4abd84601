package kill

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"

	"github.com/beezy-dev/kleidi/tpm/simboot"
)

// joining makes a machine without a keyring that another node, which serves, approves.
func joining(m *machine) simboot.Boot {
	m.remove("state")
	m.Reboot(usual)
	m.run("bootpolicy record --file DIR/policy.yaml")
	seat, ek := newSeat(m), m.ek()
	m.approve = func() string { return seat.approves(m.name, ek, m.path("policy.yaml")) }
	return usual
}

// ek returns the digest of the machine's endorsement key.
func (m *machine) ek() string {
	m.t.Helper()
	var id struct{ EK string }
	if err := json.Unmarshal(m.run("node identity -o json"), &id); err != nil {
		m.t.Fatal(err)
	}
	return id.EK
}

// approves has this node approve another one, and returns the command by which that one
// joins.
func (m *machine) approves(name, ek, policy string) string {
	m.t.Helper()
	out := strings.TrimSpace(string(m.run("node approve " + name + " --ek " + ek + " --boot-policy " + policy)))
	return strings.TrimPrefix(out[strings.LastIndex(out, "\n")+1:], "kleidi ")
}

// loopback is an address that no other process listens on.
func loopback(port int) string {
	return fmt.Sprintf("127.%d.%d.1:%d", 64+os.Getpid()%64, os.Getpid()/64%256, port)
}

// recordedPolicy records the boot of the machine as a boot policy.
func recordedPolicy(m *machine) simboot.Boot {
	m.Reboot(usual)
	m.run("bootpolicy record --file DIR/policy.yaml")
	return usual
}

// newSeat starts another machine, which has a keyring and answers joining ones.
func newSeat(m *machine) *machine {
	m.t.Helper()
	seat := newMachine(m.t)
	seat.name = "seat"
	seat.configure("join: {listen: " + loopback(9780) + "}\n")
	seat.Reboot(usual)
	seat.run("init --recovery-recipient " + seat.identity())
	m.t.Cleanup(seat.background())
	return seat
}

// background starts serve, and returns the function that ends it.
func (m *machine) background() (stop func()) {
	m.t.Helper()
	serve := m.command("serve")
	if err := serve.Start(); err != nil {
		m.t.Fatal(err)
	}
	// Without a serve, kleidi status inspects the machine itself, which says nothing
	// about the serve.
	eventually(m.t, "serve answers on its admin socket", func() error {
		conn, err := net.Dial("unix", m.path("admin.sock"))
		if err == nil {
			err = conn.Close()
		}
		return err
	})
	// An operation waits 2 s for the first attempt to unlock, which takes longer on a busy machine.
	eventually(m.t, "serve has tried to open the keyring", func() error {
		out, err := m.try("status -o json --quick")
		if err == nil && bytes.Contains(out, []byte(`"starting"`)) {
			err = errors.New(string(out))
		}
		return err
	})
	return func() {
		_ = serve.Process.Kill()
		_ = serve.Wait()
	}
}

// inFormat2 makes a first approval write the keyring in format 2.
func inFormat2(boot simboot.Boot) func(*machine) simboot.Boot {
	return func(m *machine) simboot.Boot {
		recordedPolicy(m)
		stop := m.background()
		defer stop()
		m.run(approveTwo)
		return boot
	}
}

// approveTwo approves a machine that does not exist.
var approveTwo = "node approve two --ek sha256:" + strings.Repeat("0", 64) + " --boot-policy DIR/policy.yaml"
