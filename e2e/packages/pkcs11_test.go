package packages

import (
	"crypto/rand"
	"path/filepath"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/e2e/nspawn"
)

// variants: the package with PKCS#11 replaces the other one and the other way around, each
// time with the state kept and kleidi running as before. In between, the unit reaches a
// token of SoftHSM.
func variants(t *testing.T, m *nspawn.Machine) {
	nspawn.Run(t, "cp", filepath.Join(nspawn.PackagePKCS11(t, "v1.1.0"), "kleidi-pkcs11_1.1.0_amd64.deb"), m.Path("root/pkcs11.deb"))
	// a C library that is too old must be found before the other package is gone
	if depends := nspawn.Run(t, "dpkg-deb", "-f", m.Path("root/pkcs11.deb"), "Depends"); !strings.HasPrefix(depends, "libc6 (>= 2.") {
		t.Errorf("it depends on %q", depends)
	}
	const module = "pkcs11: {module: /usr/lib/softhsm/libsofthsm2.so, uri: 'pkcs11:token=kleidi;object=kek', pinFile: /etc/kleidi/pkcs11.pin}\n"

	// dpkg replaces the package in one step
	a := newAPIServer(t, m)
	v := &variant{m, t}
	v.changes("dpkg --force-confold -i pkcs11.deb", "kleidi-pkcs11", func(f func()) { a.during("the package with PKCS#11", f) })

	// The token, as docs/pkcs11.md makes it
	base := strings.TrimSpace(nspawn.Run(t, "../../.ci/base"))
	debs, err := filepath.Glob(filepath.Join(base, "debs/*.deb"))
	if err != nil || len(debs) == 0 {
		t.Fatal(err, debs)
	}
	m.Sh("mkdir softhsm")
	nspawn.Run(t, "cp", append(debs, m.Path("root/softhsm"))...)
	m.ShFor(updating, "dpkg -i softhsm/*.deb")
	m.Write("etc/systemd/system/kleidi.service.d/softhsm.conf", "[Service]\nEnvironment=SOFTHSM2_CONF=/etc/softhsm/softhsm2.conf\nReadWritePaths=/var/lib/softhsm\n")
	pin := rand.Text()[:16]
	m.Write("etc/kleidi/pkcs11.pin", pin+"\n")
	m.Sh("chmod 600 /etc/kleidi/pkcs11.pin; mkdir -p /var/lib/softhsm/tokens; systemctl daemon-reload")
	m.Write("root/softhsm2.conf", "directories.tokendir = "+m.Path("var/lib/softhsm/tokens")+"\nobjectstore.backend = file\n")
	nspawn.Run(t, "env", "SOFTHSM2_CONF="+m.Path("root/softhsm2.conf"), "softhsm2-util", "--init-token", "--free", "--label", "kleidi", "--so-pin", rand.Text()[:16], "--pin", pin)
	m.Configure(module)
	m.Sh("systemctl restart kleidi; kleidi slot add pkcs11 --generate-key")
	m.Configure(module + "unlock: {order: [pkcs11]}\n")
	m.Sh("systemctl restart kleidi; kleidi slot test")
	if s := statusOf(t, m); s.State != "open" || s.Wrapper != "pkcs11" {
		t.Errorf("%+v", s)
	}

	// Back, by apt, which removes the other package first
	m.Configure("")
	v.changes("apt-get install -y -o Dpkg::Options::=--force-confold ./2.deb", "kleidi", func(f func()) { f() })
	m.Sh("rm -r /etc/systemd/system/kleidi.service.d; systemctl daemon-reload; kleidi slot remove pkcs11")
}

// variant changes the package on a machine.
type variant struct {
	*nspawn.Machine
	t *testing.T
}

// changes installs a package instead of the other one, and purges what is left of that.
func (m *variant) changes(command, name string, during func(func())) {
	m.t.Helper()
	const state = "cd /var/lib/kleidi && sha256sum *.json /etc/kleidi/config.yaml; systemctl is-enabled kleidi kleidi-booted"
	before, pid := m.Sh(state), m.Sh("systemctl show -P MainPID kleidi")
	during(func() { m.ShFor(updating, command) })
	m.Sh("kleidi status --quick; ! dpkg --verify " + name + " | grep -v ' c /'")
	if now := m.Sh("systemctl show -P MainPID kleidi"); now == pid {
		m.t.Error("the other variant still runs")
	}
	installed := func() string { return m.Sh("dpkg-query -f '${Package} ${db:Status-Abbrev}\n' -W 'kleidi*'") }
	if now := installed(); !strings.Contains(now, name+" ii") || strings.Count(now, " ii") != 1 {
		m.t.Errorf("installed:\n%s", now)
	}
	for line := range strings.Lines(installed()) {
		if other, _, _ := strings.Cut(line, " "); other != name {
			m.ShFor(updating, "KLEIDI_PURGE=keyring dpkg -P "+other)
		}
	}
	if now := m.Sh(state); now != before {
		m.t.Errorf("state before\n%s\nafter\n%s", before, now)
	}
	m.Sh("kleidi status --quick; ! dpkg --verify " + name + " | grep -v ' c /'")
}
