package docs

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// softHSM is the path of SoftHSM 2's module on Debian.
const softHSM = "/usr/lib/softhsm/libsofthsm2.so"

// tokens is the folder in which SoftHSM keeps tokens.
const tokens = "var/lib/softhsm/tokens"

// tokenSettings name the key kek of the token kleidi.
const tokenSettings = "pkcs11: {module: " + softHSM + ", uri: \"pkcs11:token=kleidi;object=kek\", pinFile: /etc/kleidi/pkcs11.pin}\n"

// withToken sets up a node whose wrappers, in this order, include a key in a token.
func withToken(order string, attests bool) func(*machine) {
	return func(m *machine) {
		withKey(m)
		m.set(fmt.Sprintf("unlock: {order: %s, requireAttestation: %t}\n%s", order, attests, tokenSettings))
		serving(m)
	}
}

// withKey sets up a machine with a key in a token, and without a keyring.
func withKey(m *machine) {
	m.buildPKCS11()
	m.newToken()
	m.must("pkcs11-tool --module " + softHSM + " --token-label kleidi --login --pin 73616220 --keygen --key-type AES:32 --label kek")
}

// emptySoftHSM installs SoftHSM without a token.
func (m *machine) emptySoftHSM() {
	m.t.Helper()
	m.remove(tokens)
	if err := os.MkdirAll(m.root(tokens), 0o700); err != nil {
		m.t.Fatal(err)
	}
	m.write("etc/softhsm2.conf", "directories.tokendir = "+m.root(tokens)+"\nobjectstore.backend = file\nlog.level = ERROR\n", 0o600)
	m.t.Setenv("SOFTHSM2_CONF", m.root("etc/softhsm2.conf"))
}

// newToken replaces the present tokens with an empty one.
func (m *machine) newToken() {
	m.t.Helper()
	m.emptySoftHSM()
	m.write("etc/kleidi/pkcs11.pin", "73616220\n", 0o600)
	m.must("softhsm2-util --init-token --free --label kleidi --so-pin 5462 --pin 73616220")
}

// legacy sets up a node on which the init container of kleidi 1.x has made its token
// with these commands, from a config.json like the example of 1.x.
func legacy(m *machine) {
	const token, pin = "kleidi-kms-plugin", "1234"
	m.buildPKCS11()
	m.emptySoftHSM()
	config, err := json.Marshal(map[string]string{"tokenLabel": token, "pin": pin, "path": "/usr/lib64/softhsm/libsofthsm.so"})
	if err != nil {
		m.t.Fatal(err)
	}
	if err := os.MkdirAll(m.root("opt/kleidi"), 0o755); err != nil { // the installation of kleidi 1.x made this folder
		m.t.Fatal(err)
	}
	m.write("opt/kleidi/config.json", string(config), 0o644)
	m.must("softhsm2-util --init-token --free --label " + token + " --pin " + pin + " --so-pin " + pin)
	m.must("pkcs11-tool --module " + softHSM + " --keygen --key-type aes:32 --pin " + pin + " --token-label " + token + " --label kleidi-kms-plugin")
}

// sources puts the repository's Makefile and the sources into the working folder.
func (m *machine) sources() {
	m.t.Helper()
	here, err := filepath.Abs(top)
	if err != nil {
		m.t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(here, "bin"), m.root("root/bin")); err != nil {
		m.t.Fatal(err)
	}
	tool, err := exec.LookPath("make")
	if err != nil {
		m.t.Fatal(err)
	}
	m.write("bin/make", fmt.Sprintf("#!/bin/sh\nexec %s -C %s \"$@\"\n", tool, here), 0o755)
	// A first build takes longer than the time limit of a document's commands.
	if out, err := exec.Command(tool, "-C", here, "build-pkcs11").CombinedOutput(); err != nil {
		m.t.Fatalf("make build-pkcs11: %v\n%s", err, out)
	}
}

// buildPKCS11 makes the machine run a kleidi with PKCS#11, which the pure-Go binary
// lacks: the binary in the variable KLEIDI_PKCS11, or a new build.
func (m *machine) buildPKCS11() {
	m.t.Helper()
	if m.binary = os.Getenv("KLEIDI_PKCS11"); m.binary == "" {
		m.binary = build(m.t, "github.com/beezy-dev/kleidi/cmd/kleidi", "1")
	}
	m.writeKleidi()
}

// useInstalled makes the machine run the kleidi that a document's commands installed.
func (m *machine) useInstalled() {
	if m.exists("usr/local/bin/kleidi") {
		m.binary = m.root("usr/local/bin/kleidi")
		m.writeKleidi()
	}
}

// bootOther boots another kernel.
func (m *machine) bootOther() {
	m.stop()
	m.boot.Kernel = "6.12.63+deb13-amd64"
	m.Reboot(m.boot)
}

// TestPureGoSaysHowToGetPKCS11: a token is configured, but this kleidi can't load a
// module.
func TestPureGoSaysHowToGetPKCS11(t *testing.T) {
	m := newMachine(t)
	serving(m)
	m.stop()
	m.set(tokenSettings)
	for _, verb := range []string{"serve", "status", "slot add pkcs11"} {
		out, err := m.shell("kleidi " + verb)
		for _, says := range []string{"this kleidi was built without PKCS#11", "make build-pkcs11", "docs/pkcs11.md"} {
			if err == nil || !strings.Contains(out, says) {
				t.Errorf("kleidi %s does not say %q: %v\n%s", verb, says, err, out)
			}
		}
	}
}
