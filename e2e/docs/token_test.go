package docs

import (
	"fmt"
	"os"
	"os/exec"
)

// softHSM is the module of SoftHSM 2.
const softHSM = "/usr/lib/softhsm/libsofthsm2.so"

// withToken has a key in a token as a wrapper, in this order of wrappers.
func withToken(order string, attests bool) func(*machine) {
	return func(m *machine) {
		m.buildPKCS11()
		m.newToken()
		m.must("pkcs11-tool --module " + softHSM + " --token-label kleidi --login --pin 73616220 --keygen --key-type AES:32 --label kek")
		m.settings = fmt.Sprintf("unlock: {order: %s, requireAttestation: %t}\npkcs11:\n  module: %s\n  uri: pkcs11:token=kleidi;object=kek\n  pinFile: %s\n",
			order, attests, softHSM, m.root("etc/kleidi/pkcs11.pin"))
		m.configure()
		// What is started by systemctl here is started by the test.
		m.write("bin/systemctl", "#!/bin/sh\n[ \"$*\" = 'restart kleidi' ] && touch "+m.root("root/restarting")+"\n", 0o755)
		serving(m)
	}
}

// newToken puts an empty token in the place of what is there.
func (m *machine) newToken() {
	m.t.Helper()
	m.remove("tokens")
	if err := os.Mkdir(m.root("tokens"), 0o700); err != nil {
		m.t.Fatal(err)
	}
	m.write("etc/softhsm2.conf", "directories.tokendir = "+m.root("tokens")+"\nobjectstore.backend = file\nlog.level = ERROR\n", 0o600)
	m.t.Setenv("SOFTHSM2_CONF", m.root("etc/softhsm2.conf"))
	m.write("etc/kleidi/pkcs11.pin", "73616220\n", 0o600)
	m.must("softhsm2-util --init-token --free --label kleidi --so-pin 5462 --pin 73616220")
}

// buildPKCS11 has the machine run a kleidi with PKCS#11, which the pure-Go one lacks.
func (m *machine) buildPKCS11() {
	m.t.Helper()
	m.binary = m.root("bin/kleidi-pkcs11")
	build := exec.Command("go", "build", "-o", m.binary, "github.com/beezy-dev/kleidi/cmd/kleidi")
	build.Env = append(os.Environ(), "CGO_ENABLED=1")
	if out, err := build.CombinedOutput(); err != nil {
		m.t.Fatalf("go build: %v\n%s", err, out)
	}
	m.writeKleidi()
}

// bootOther boots another kernel.
func (m *machine) bootOther() {
	m.stop()
	m.boot.Kernel = "6.12.63+deb13-amd64"
	m.Reboot(m.boot)
}

// restartIfAsked does what systemctl restart kleidi asked for.
func (m *machine) restartIfAsked() {
	m.t.Helper()
	if !m.exists("root/restarting") {
		return
	}
	m.remove("root/restarting")
	m.stop()
	m.serveIfPossible()
}
