package packages

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/e2e/nspawn"
)

// verifier: systemd runs the verifier from the package, here beside a node that needs it.
// It stops, crashes, is upgraded and removed, and keeps its keys.
func verifier(t *testing.T, m *nspawn.Machine) {
	const config = "/etc/kleidi/verifier/verifier.yaml"
	says := func(words string) {
		t.Helper()
		node.Eventually(t, 2*time.Minute, "the unit says "+words, func() error {
			if out := m.Sh("systemctl status -n 20 --no-pager kleidi-verifier || true"); !strings.Contains(out, words) {
				return errors.New(out)
			}
			return nil
		})
	}
	m.Sh("systemctl start --no-block kleidi-verifier")
	says("make one with kleidi verifier init")
	m.Sh("systemctl stop kleidi-verifier")

	m.Sh(`kleidi bootpolicy record --file cp-1.yaml
kleidi verifier init --cluster-id "$(kleidi keyring show | awk '/^cluster ID/ {print $3}')" --name 127.0.0.1
install -m 0600 cp-1.yaml /etc/kleidi/verifier/cp-1.yaml
kleidi --config /etc/kleidi/verifier/verifier.yaml verifier register cp-1 --ek "$(kleidi keyring show | awk '$1 == "node" && $2 == "cp-1" {print $4}')" --boot-policy /etc/kleidi/verifier/cp-1.yaml
printf 'http: {socketMode: "0660", socketGID: 7}\n' >>` + config + `
systemctl enable -q --now kleidi-verifier`)
	var shown struct{ Certificate, PublicKey string }
	if err := json.Unmarshal([]byte(m.Sh("kleidi --config /etc/kleidi/verifier/verifier.yaml verifier show -o json")), &shown); err != nil {
		t.Fatal(err)
	}
	m.Write("etc/kleidi/verifier.pub", shown.PublicKey)
	m.Configure("  verifier: {address: 127.0.0.1:9781, certificate: '" + shown.Certificate + "', publicKey: /etc/kleidi/verifier.pub}\n")
	v := &verifierUnit{m, t}
	v.reseal()
	v.needed("after the enrolment")
	if out := m.Sh("stat -c '%a %g' /run/kleidi-verifier/http.sock"); out != "660 7\n" {
		t.Errorf("http.sock: %s", out)
	}
	// What the kernel enforces on the process
	status := m.Sh("cat /proc/$(systemctl show -P MainPID kleidi-verifier)/status")
	for _, want := range []string{`CapBnd:\s0+1\n`, `NoNewPrivs:\s1\n`, `Seccomp:\s2\n`} {
		if !regexp.MustCompile(want).MatchString(status) {
			t.Errorf("/proc/PID/status does not match %q:\n%s", want, status)
		}
	}
	if out, err := m.Try("nsenter -m -t $(systemctl show -P MainPID kleidi-verifier) sh -c 'touch /etc/kleidi/x || touch /var/lib/x || ls /root/1.deb'"); err == nil {
		t.Errorf("files of others: %s", out)
	}

	kept := m.Sh(keysOfVerifier)
	for _, what := range []string{"systemctl reload kleidi-verifier", "systemctl restart kleidi-verifier", "kill -9 $(systemctl show -P MainPID kleidi-verifier)",
		"pid() { systemctl show -P MainPID kleidi-verifier; }; was=$(pid); dpkg --force-confold -i 2.deb; test $(pid) != $was"} {
		m.ShFor(updating, what)
		v.needed("after " + what)
	}

	// A faulty configuration is told, and once it is corrected the verifier starts by itself
	m.Sh("systemctl stop kleidi-verifier; test ! -e /run/kleidi-verifier; cp -p " + config + " v.yaml; echo nonsense: true >>" + config + "; systemctl restart kleidi")
	node.Eventually(t, 2*time.Minute, "without a verifier the node is locked", func() error {
		if code, body, err := node.Get(m.Live("/run/kleidi/http.sock"), "/readyz"); err != nil || !strings.Contains(body, "backend-unavailable") {
			return fmt.Errorf("%d %s: %w", code, body, err)
		}
		return nil
	})
	m.Sh("systemctl start --no-block kleidi-verifier")
	says("nonsense: ")
	m.Sh("mv v.yaml " + config)
	v.open("after the correction")

	m.Sh("dpkg -r kleidi; ! systemctl is-active kleidi-verifier; test ! -L /etc/systemd/system/multi-user.target.wants/kleidi-verifier.service")
	m.Sh("KLEIDI_PURGE=keyring dpkg -P kleidi")
	if now := m.Sh(keysOfVerifier); now != kept {
		t.Errorf("the verifier's files were\n%s\nand are\n%s", kept, now)
	}
}

const keysOfVerifier = "cd /etc/kleidi/verifier && sha256sum tls.crt tls.key signing.key verifier.yaml cp-1.yaml"

// verifierUnit is the running unit.
type verifierUnit struct {
	*nspawn.Machine
	t *testing.T
}

// reseal restarts the node with the verifier in its configuration, and seals with it. The
// verifier gives a node 3 s for its first message, which a busy machine may exceed.
func (m *verifierUnit) reseal() {
	m.t.Helper()
	m.Sh("systemctl restart kleidi")
	node.Again(m.t, 2*time.Minute, "the slot is sealed with the verifier", func() error {
		if out, err := m.Try("kleidi reseal"); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}, "check that kleidi verifier runs")
}

// open waits until the verifier is ready and the node is open.
func (m *verifierUnit) open(what string) {
	m.t.Helper()
	node.Eventually(m.t, 2*time.Minute, what+", the verifier is ready and the node open", func() error {
		for _, socket := range []string{"/run/kleidi-verifier/http.sock", "/run/kleidi/http.sock"} {
			if code, body, err := node.Get(m.Live(socket), "/readyz"); err != nil || code != http.StatusOK {
				return fmt.Errorf("%s: %d %s: %w", socket, code, body, err)
			}
		}
		return nil
	})
}

// needed restarts the node, which opens only with the verifier's signature.
func (m *verifierUnit) needed(what string) {
	m.t.Helper()
	before := m.accepted()
	m.Sh("systemctl restart kleidi")
	m.open(what)
	if now := m.accepted(); now <= before {
		m.t.Errorf("%s: the verifier has accepted evidence %d times, then %d times", what, before, now)
	}
}

// accepted counts in the verifier's audit log.
func (m *verifierUnit) accepted() int {
	return strings.Count(m.Read("etc/kleidi/verifier/audit.log"), `"accepted":true`)
}
