package vault

import (
	"bytes"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/e2e/site"
	"github.com/beezy-dev/kleidi/seal"
)

// host is a node whose kleidi uses the Vault of a scene as a wrapper.
type host struct {
	*site.Site
	scene *scene
}

// newHost runs init with this order of wrappers. If the TPM is not among them, the
// machine has none.
func newHost(t *testing.T, order string) *host {
	t.Helper()
	f := newScene(t, tokenAuth)
	return &host{site.New(t, node.Setup{Settings: settings(f, order), NoTPM: !strings.Contains(order, "tpm")}), f}
}

func settings(f *scene, order string) string {
	return fmt.Sprintf(`unlock: {order: %s, requireAttestation: %t, selfTest: 1m}
vault:
  address: %s
  caFile: %s
  serverName: %s
  key: kleidi
  timeout: %s
  auth: {method: token, tokenFile: %s}
log: {level: debug}`, order, strings.Contains(order, "tpm"), f.gate.url, f.path("ca.pem"), serverName, answers, f.path("token"))
}

// saidNoSecret demands that neither the log nor the output of the commands contains the
// KEK in that slot, or the present credentials.
func (s *host) saidNoSecret(t *testing.T, slot seal.Slot) {
	t.Helper()
	secrets := secretsOf(t, s.scene)
	kek, err := s.scene.w.Unwrap(t.Context(), slot)
	if err != nil {
		t.Fatal(err)
	}
	defer kek.Close()
	kek.With(func(b []byte) { secrets["KEK of the node"] = bytes.Clone(b) })
	s.SaidNone(secrets)
}

// serveFaults are the wrapper's faults, and those that only a whole kleidi shows.
var serveFaults = append([]fault{
	{name: "wrong credentials", cause: seal.CauseCredentials, says: []string{"the token is expired, revoked or of another server", "vault.auth.tokenFile"}, wraps: true, opens: true,
		break_: func(f *scene) { f.write("token", []byte("hvs.of-another-server")) }, mend: func(f *scene) { tokenAuth(f.server) }},
	{name: "wrong TLS name", cause: seal.CauseUnavailable, says: []string{`its certificate is not for "` + serverName + `"`, "set vault.serverName"}, wraps: true, opens: true,
		break_: func(f *scene) { f.reissue("other.test") }, mend: func(f *scene) { f.reissue(serverName) }},
}, tokenFaults...)

// reissue starts the server again, with a certificate for another name.
func (f *scene) reissue(name string) {
	f.t.Helper()
	f.Stop()
	f.ca.issue(f.t, f.path("server"), name)
	f.start()
}

// TestServeFaults: with any fault of Vault, an open kleidi goes on and a rotation
// changes nothing. A kleidi that starts is locked and says why, and opens without help
// after the repair.
func TestServeFaults(t *testing.T) {
	t.Parallel()
	s := newHost(t, "[vault]")
	var rows []site.Fault
	for _, row := range serveFaults {
		rows = append(rows, row.whole(s.scene))
	}
	s.Matrix(seal.TypeVault, rows)
	s.saidNoSecret(t, s.SlotOf(seal.TypeVault))
}

// whole returns the row for a whole kleidi.
func (row fault) whole(f *scene) site.Fault {
	return site.Fault{Name: row.name, Cause: row.cause, Says: row.says, Wraps: row.wraps, Opens: row.opens,
		Break: func() { row.break_(f) }, Mend: func() { row.mend(f) }}
}

// TestServeSkipsSlot: a rotation that was told to go on without a slot reports the
// missing slot until the slot exists again, and never shows it as usable.
func TestServeSkipsSlot(t *testing.T) {
	t.Parallel()
	s := newHost(t, "[tpm, vault]")
	s.Do("slot test", "tpm", "vault")
	before := s.Stored()
	s.scene.gate.shut()
	s.Refuse("rotate", "wrap the new KEK for the vault slot", "connection refused", "start the server, or correct vault.address")
	if !bytes.Equal(before, s.Stored()) {
		t.Error("a refused rotation changed the keyring")
	}
	s.Refuse("rotate --skip-slot vaults", `there is no slot "vaults"`)
	s.Refuse("rotate --skip-slot tpm", "connection refused")
	s.Refuse("rotate --skip-slot tpm --skip-slot vault", "no slot would be left")
	s.Do("rotate --skip-slot vault")
	for _, command := range []string{"slot list", "status"} {
		if !regexp.MustCompile(`(?m)^(slot +)?vault .*left out by the rotation`).MatchString(s.Do(command)) {
			t.Errorf("kleidi %s does not say that the slot of vault is missing", command)
		}
	}
	s.Do("rotate") // the next rotation leaves the slot out as well
	s.Do("status", "left out by the rotation")
	s.Refuse("slot test", "DOES NOT OPEN", "run kleidi slot add vault once its backend answers")
	s.Refuse("slot add vault", "connection refused")
	s.Restart()
	s.WaitOpen()
	s.WaitSays(http.StatusOK, "self-test: slot vault does not open", "run kleidi slot add vault")
	s.Metric("kleidi_self_test_failed_slots 1")

	s.scene.gate.open()
	s.Do("slot add vault", "the KEK is wrapped by vault as well")
	if out := s.Do("status") + s.Do("slot list"); strings.Contains(out, "left out") {
		t.Errorf("it is mended, and still shown:\n%s", out)
	}
	s.Do("slot test", "vault")
	s.Decrypts()
	s.saidNoSecret(t, s.SlotOf(seal.TypeVault))
}

// TestServeFallsBack: if the TPM refuses, kleidi falls back to Vault, loudly. If Vault
// is unavailable too, kleidi is locked, reports both, and later opens without help.
func TestServeFallsBack(t *testing.T) {
	t.Parallel()
	s := newHost(t, "[tpm, vault]")
	s.Metric("kleidi_fallback 0")
	other := s.Kernel
	other.Kernel = "6.1.0-666-amd64"
	s.Serving.Stop()
	s.Reboot(other)

	s.scene.gate.shut()
	s.Serve()
	s.WaitSays(http.StatusServiceUnavailable, "locked: boot-state-not-authorized", "PCR 4", "connection refused")
	s.Do("status", "the machine booted with another kernel", "connection refused")
	s.scene.gate.open()
	s.WaitOpen()
	s.WaitSays(http.StatusOK, "fallback: opened by vault, since: the machine booted with another kernel")
	s.Metric("kleidi_fallback 1")
	s.Metric("kleidi_open 1")
	s.Do("status", "opened by vault, because no wrapper before it in unlock.order opened it")
	s.Decrypts()
	s.WantIn("the log", s.Log(), "opened by a fallback")

	s.Do("rotate")
	s.Restart()
	s.WaitOpen()
	s.Decrypts()
	s.Do("reseal")
	s.Restart()
	s.WaitOpen()
	s.Metric("kleidi_fallback 0")
	s.Decrypts()
	s.saidNoSecret(t, s.SlotOf(seal.TypeVault))
}

// TestServeWithoutFallback: a slot that is not in unlock.order opens nothing.
func TestServeWithoutFallback(t *testing.T) {
	t.Parallel()
	s := newHost(t, "[tpm]")
	s.Do("slot add vault", "it opens nothing at start until unlock.order names vault")
	other := s.Kernel
	other.Kernel = "6.1.0-666-amd64"
	s.Serving.Stop()
	s.Reboot(other)
	s.Serve()
	s.WaitLocked("PCR 4")
}

// TestServeVersions: a slot survives the rotation of its key and is moved to the new
// version. A setting that locks the slot out is found while kleidi is open.
func TestServeVersions(t *testing.T) {
	t.Parallel()
	s := newHost(t, "[vault]")
	f := s.scene
	f.must("transit/keys/kleidi/rotate", nil)
	s.Restart()
	s.WaitOpen()
	s.Do("slot test", "opens", "run kleidi slot rewrap NAME before you raise min_decryption_version")
	s.Do("slot list", "version 1")
	s.Do("slot rewrap vault", "version 2")
	f.must("transit/keys/kleidi/config", map[string]any{"min_decryption_version": 2})
	if out := s.Do("slot test", "opens"); strings.Contains(out, "rewrap") {
		t.Errorf("the slot is of the newest version:\n%s", out)
	}
	s.Restart()
	s.WaitOpen()

	t.Log("raised too early")
	f.must("transit/keys/kleidi/rotate", nil)
	f.must("transit/keys/kleidi/config", map[string]any{"min_decryption_version": 3})
	s.Refuse("slot test", "DOES NOT OPEN", "min_decryption_version is above the slot's version")
	s.WaitSays(http.StatusOK, "self-test: slot vault does not open", "min_decryption_version")
	s.Metric("kleidi_self_test_failed_slots 1")
	s.Decrypts()
	s.Refuse("slot rewrap vault", "min_decryption_version is above the slot's version")
	s.Refuse("rotate", "min_decryption_version is above the slot's version")
	s.Do("slot rewrap vault --new-key", "version 3") // the KEK is open, so the old version isn't needed
	s.Do("slot test", "opens")
	s.Restart()
	s.WaitOpen()
	s.Decrypts()
	s.saidNoSecret(t, s.SlotOf(seal.TypeVault))
}

// notices bounds the time until kleidi makes its next request.
const notices = 2 * time.Minute

// TestServeDownDuringUnlock: the server disappears during the unlock.
func TestServeDownDuringUnlock(t *testing.T) {
	t.Parallel()
	s := newHost(t, "[vault]")
	s.Serving.Stop()
	s.scene.gate.stall()
	s.Serve()
	node.Eventually(t, notices, "kleidi asks Vault", s.scene.gate.wasAsked)
	s.WaitSays(http.StatusServiceUnavailable, "locked: starting")
	s.scene.gate.shut()
	s.WaitSays(http.StatusServiceUnavailable, "locked: backend-unavailable")
	s.scene.gate.open()
	s.WaitOpen()
	s.Decrypts()
}
