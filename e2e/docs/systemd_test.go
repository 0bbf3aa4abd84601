package docs

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
)

// The test itself does the work that the documents' commands ask of systemd.

// asked is the file in which systemctl writes its request. The test removes it
// afterwards.
const asked = "run/systemctl"

// writeSystemctl makes the command systemctl, which waits until its request is done,
// and the journal's command.
func (m *machine) writeSystemctl() {
	m.write("bin/journalctl", fmt.Sprintf("#!/bin/sh\n[ \"$*\" = '-u kleidi' ] && exec cat %s\n", m.root("root/kleidi.log")), 0o755)
	m.write("bin/systemctl", fmt.Sprintf(`#!/bin/sh
case "$*" in
'daemon-reload') exit 0 ;;
'start kleidi' | 'stop kleidi' | 'restart kleidi' | 'enable --now kleidi') ;;
*) echo "systemctl $*: not known here" >&2 && exit 1 ;;
esac
echo "$*" >%[1]s.new && mv %[1]s.new %[1]s
while [ -e %[1]s ]; do sleep 0.05; done
`, m.root(asked)), 0o755)
}

// obeySystemctl does the requested work. As with a unit of Type=notify, the command
// waits until kleidi says that it is ready, and no longer.
func (m *machine) obeySystemctl() {
	m.t.Helper()
	if !m.exists(asked) {
		return
	}
	verb := strings.Fields(read(m.t, m.root(asked)))[0]
	if verb == "stop" || verb == "restart" {
		m.stop()
	}
	if verb != "stop" && m.serving == nil {
		m.start()
	}
	m.remove(asked)
}

func (m *machine) start() {
	m.t.Helper()
	m.useInstalled()
	socket := m.root("run/notify")
	m.remove("run/notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		m.t.Fatal(err)
	}
	defer l.Close()
	m.serving = node.Start(m.t, m.root("root/kleidi.log"), "env", "NOTIFY_SOCKET="+socket, m.binary, "serve", "--config", m.root("etc/kleidi/config.yaml"))
	message := make([]byte, 4096)
	for n := 0; !strings.Contains(string(message[:n]), "READY=1"); {
		if err := errors.Join(m.serving.Alive(), l.SetReadDeadline(time.Now().Add(2*time.Minute))); err != nil {
			m.t.Fatal(err)
		}
		if n, err = l.Read(message); err != nil {
			m.t.Fatalf("kleidi serve does not say that it is ready: %v", errors.Join(err, m.serving.Alive()))
		}
	}
}

// serveIfPossible runs the unit, as on a machine that was set up, and waits until kleidi
// has tried to unlock.
func (m *machine) serveIfPossible() {
	m.t.Helper()
	if m.serving == nil {
		if !m.exists("var/lib/kleidi/keyring.json") {
			return
		}
		m.start()
	}
	node.Eventually(m.t, 2*time.Minute, "kleidi has tried to unlock", func() error {
		code, body, err := m.get("/readyz")
		if err == nil && code != http.StatusOK && (strings.Contains(body, "starting") || !strings.HasPrefix(body, "locked")) {
			err = errors.New(body)
		}
		return err
	})
}

func (m *machine) stop() {
	if m.serving != nil {
		m.serving.Stop()
	}
	m.serving = nil
}

func (m *machine) remove(path string) {
	if err := os.RemoveAll(m.root(path)); err != nil {
		m.t.Fatal(err)
	}
}
