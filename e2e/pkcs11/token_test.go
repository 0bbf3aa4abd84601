package pkcs11

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/e2e/site"
	"github.com/beezy-dev/kleidi/hsm"
	"github.com/beezy-dev/kleidi/seal"
)

// tries is the number of wrong PINs that lock the token.
const tries = 9

// token is a token with an AES key, behind the shim.
type token struct {
	t                *testing.T
	dir              string
	pin, wrong       string
	module, initArgs string // the shim's
	// deleteKey deletes the key, and keeps a copy for putBack.
	deleteKey func()
}

// newSoftHSM makes a token of SoftHSM.
func newSoftHSM(t *testing.T) *token {
	t.Helper()
	k := newToken(t, "/usr/lib/softhsm/libsofthsm2.so", "/usr/lib64/softhsm/libsofthsm2.so")
	k.write("softhsm2.conf", "directories.tokendir = "+k.path("tokens")+"\nobjectstore.backend = file\nlog.level = ERROR\n")
	t.Setenv("SOFTHSM2_CONF", k.path("softhsm2.conf"))
	k.run("softhsm2-util", "--init-token", "--free", "--label", "kleidi", "--so-pin", rand.Text()[:16], "--pin", k.pin)
	k.tool("--keygen", "--key-type", "AES:32", "--label", "kek")
	k.deleteKey = func() {
		k.ok(os.CopyFS(k.path("away"), os.DirFS(k.path("tokens"))))
		k.tool("--delete-object", "--type", "secrkey", "--label", "kek")
	}
	return k
}

// newNSS makes a database of NSS softokn.
func newNSS(t *testing.T) *token {
	t.Helper()
	t.Setenv("NSS_MAX_MP_PBE_ITERATION_COUNT", "1") // so that a login costs as little as with other tokens
	var paths []string
	for _, dir := range []string{"/usr/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu/nss", "/usr/lib/aarch64-linux-gnu", "/usr/lib64"} {
		paths = append(paths, dir+"/libsoftokn3.so")
	}
	k := newToken(t, paths...)
	k.initArgs = fmt.Sprintf("configdir='sql:%s' certPrefix='' keyPrefix='' secmod='' flags=noModDB dbTokenDescription='kleidi'", k.path("tokens"))
	k.run("certutil", "-N", "-d", "sql:"+k.path("tokens"), "-f", k.path("pin"))
	k.ok(os.CopyFS(k.path("without"), os.DirFS(k.path("tokens"))))
	_, err := k.wrapper().GenerateKey(t.Context())
	k.ok(err)
	k.deleteKey = func() {
		k.ok(os.Rename(k.path("tokens"), k.path("away")))
		k.ok(os.CopyFS(k.path("tokens"), os.DirFS(k.path("without"))))
	}
	return k
}

// newToken makes the common surroundings of both kinds. The environment names the
// module to the shim, and so to every kleidi that the test starts. The module is the
// first one of modules that exists.
func newToken(t *testing.T, modules ...string) *token {
	t.Helper()
	k := &token{t: t, dir: t.TempDir(), pin: rand.Text()[:16], wrong: rand.Text()[:16]}
	for _, path := range modules {
		if _, err := os.Stat(path); err == nil && k.module == "" {
			k.module = path
		}
	}
	if k.module == "" {
		t.Fatalf("none of %q is there; run .ci/deps softhsm2-util nss", modules)
	}
	k.mkdir("tokens")
	k.write("pin", k.pin+"\n")
	k.write("fault", "")
	k.link(shim)
	for name, value := range map[string]string{"KLEIDI_TEST_MODULE": k.module, "KLEIDI_TEST_TRIES": k.path("tries"),
		"KLEIDI_TEST_MOST": strconv.Itoa(tries), "KLEIDI_TEST_FAULT": k.path("fault")} {
		t.Setenv(name, value)
	}
	return k
}

// settings are kleidi's settings for this token.
func (k *token) settings(order string) string {
	selfTest := "1m"
	if !strings.Contains(order, "tpm, ") {
		selfTest = "0s" // its login would reset a count of wrong PINs that a fault sets meanwhile
	}
	return fmt.Sprintf(`unlock: {order: %s, requireAttestation: %t, selfTest: %s}
pkcs11: {module: %s, initArgs: %q, uri: "pkcs11:token=kleidi;object=kek", pinFile: %s, timeout: 20s}
log: {level: debug}`, order, strings.Contains(order, "tpm"), selfTest, k.path("module.so"), k.initArgs, k.path("pin"))
}

// newSite is a node with the token. If the TPM is not in the order, the machine has
// none.
func newSite(t *testing.T, k *token, order string) *site.Site {
	t.Helper()
	setup := node.Setup{Binary: binary, Settings: k.settings(order), NoTPM: !strings.Contains(order, "tpm")}
	if strings.Contains(order, "-and-") {
		setup.Init = []string{"--no-recovery", "--accept-data-loss"}
	}
	return site.New(t, setup)
}

// wrapper is the token's wrapper in the test's own process.
func (k *token) wrapper() *hsm.Wrapper {
	k.t.Helper()
	w, err := hsm.New(hsm.Config{Module: k.module, InitArgs: k.initArgs, URI: "pkcs11:token=kleidi;object=kek", PINFile: k.path("pin"), Timeout: 2 * time.Minute})
	if err != nil {
		k.t.Fatal(err)
	}
	return w
}

// secrets are the token's PINs.
func (k *token) secrets() map[string][]byte {
	return map[string][]byte{"PIN": []byte(k.pin), "wrong PIN": []byte(k.wrong)}
}

// kek returns the KEK in a slot of the token.
func (k *token) kek(slot seal.Slot) []byte {
	k.t.Helper()
	kek, err := k.wrapper().Unwrap(k.t.Context(), slot)
	k.ok(err)
	defer kek.Close()
	var copied []byte
	kek.With(func(b []byte) { copied = bytes.Clone(b) })
	return copied
}

func (k *token) path(name string) string { return filepath.Join(k.dir, name) }

func (k *token) write(name, content string) {
	k.t.Helper()
	k.ok(os.WriteFile(k.path(name), []byte(content), 0o600))
}

func (k *token) read(name string) string {
	k.t.Helper()
	b, err := os.ReadFile(k.path(name))
	k.ok(err)
	return strings.TrimSpace(string(b))
}

func (k *token) mkdir(name string) {
	k.t.Helper()
	k.ok(os.Mkdir(k.path(name), 0o700))
}

// fault sets the fault of the shim.
func (k *token) fault(name string) {
	k.t.Helper()
	k.write("fault", name)
}

// link replaces kleidi's module with another one; "" removes it.
func (k *token) link(to string) {
	k.t.Helper()
	_ = os.Remove(k.path("module.so"))
	if to != "" {
		k.ok(os.Symlink(to, k.path("module.so")))
	}
}

// takeOut moves the folder of the tokens away; putBack moves it back.
func (k *token) takeOut() {
	k.t.Helper()
	k.ok(os.Rename(k.path("tokens"), k.path("away")))
	k.mkdir("tokens")
}

func (k *token) putBack() {
	k.t.Helper()
	k.ok(os.Rename(k.path("tokens"), filepath.Join(k.t.TempDir(), "tokens")))
	k.ok(os.Rename(k.path("away"), k.path("tokens")))
}

// tool runs pkcs11-tool, logged in.
func (k *token) tool(args ...string) {
	k.t.Helper()
	k.run("pkcs11-tool", append([]string{"--module", shim, "--token-label", "kleidi", "--login", "--pin", k.pin}, args...)...)
}

func (k *token) run(name string, args ...string) {
	k.t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		k.t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
}

func (k *token) ok(err error) {
	k.t.Helper()
	if err != nil {
		k.t.Fatal(err)
	}
}
