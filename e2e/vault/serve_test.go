package vault

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	kmsapi "k8s.io/kms/apis/v2"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// site is a node whose kleidi has the Vault of a scene as a wrapper.
type site struct {
	*node.Node
	t     *testing.T
	scene *scene
	seed  *kmsapi.EncryptResponse // a DEK seed that has to decrypt for ever
	said  bytes.Buffer            // all that the commands printed
}

// newSite runs init with this order of wrappers; where the TPM is not among them,
// the machine has none.
func newSite(t *testing.T, order string) *site {
	t.Helper()
	f := newScene(t, tokenAuth)
	s := &site{t: t, scene: f}
	s.Node = node.Make(t, node.Setup{Settings: s.settings(order), NoTPM: !strings.Contains(order, "tpm")})
	s.ServeOpen()
	s.encryptSeed()
	return s
}

func (s *site) settings(order string) string {
	return fmt.Sprintf(`unlock: {order: %s, requireAttestation: %t, selfTest: 1m}
vault:
  address: %s
  caFile: %s
  serverName: %s
  key: kleidi
  timeout: 2s
  auth: {method: token, tokenFile: %s}
log: {level: debug}`, order, strings.Contains(order, "tpm"), s.scene.gate.url, s.scene.path("ca.pem"), serverName, s.scene.path("token"))
}

func (s *site) restart() {
	s.t.Helper()
	s.Serving.Stop()
	s.Serve()
}

var seed = bytes.Repeat([]byte("kleidi"), 6)[:32]

func (s *site) client() kmsapi.KeyManagementServiceClient {
	s.t.Helper()
	conn, err := grpc.NewClient("unix://"+s.Path("run/kms.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { conn.Close() })
	return kmsapi.NewKeyManagementServiceClient(conn)
}

func (s *site) encryptSeed() {
	s.t.Helper()
	var err error
	if s.seed, err = s.client().Encrypt(s.t.Context(), &kmsapi.EncryptRequest{Uid: "1", Plaintext: seed}); err != nil {
		s.t.Fatal(err)
	}
}

// decrypts wants the seed back.
func (s *site) decrypts() {
	s.t.Helper()
	r, err := s.client().Decrypt(s.t.Context(), &kmsapi.DecryptRequest{Uid: "1", Ciphertext: s.seed.Ciphertext, KeyId: s.seed.KeyId})
	if err != nil {
		s.t.Fatalf("what was encrypted before does not decrypt: %v", err)
	}
	if !bytes.Equal(r.Plaintext, seed) {
		s.t.Fatal("the seed decrypts to something else")
	}
}

// run is a command that succeeds and says these.
func (s *site) run(command string, says ...string) string {
	s.t.Helper()
	out, err := s.try(command)
	if err != nil {
		s.t.Errorf("kleidi %s: %v", command, err)
	}
	wantIn(s.t, "kleidi "+command, out, says)
	return out
}

// refuse is a command that fails and says these.
func (s *site) refuse(command string, says ...string) {
	s.t.Helper()
	out, err := s.try(command)
	if err == nil {
		s.t.Errorf("kleidi %s succeeds:\n%s", command, out)
		return
	}
	wantIn(s.t, "kleidi "+command, err.Error(), says)
}

func (s *site) try(command string) (string, error) {
	s.t.Helper()
	words := strings.Fields(command)
	out, err := s.Try(words[0], words[1:]...)
	s.said.Write(out)
	if err != nil {
		s.said.WriteString(err.Error())
	}
	return string(out), err
}

func wantIn(t *testing.T, where, text string, says []string) {
	t.Helper()
	for _, want := range says {
		if !strings.Contains(text, want) {
			t.Errorf("%s does not say %q:\n%s", where, want, text)
		}
	}
}

// waitSays waits until /readyz has this status and says these.
func (s *site) waitSays(status int, says ...string) {
	s.t.Helper()
	node.Eventually(s.t, 30*time.Second, "readyz says "+strings.Join(says, ", "), func() error {
		code, body, err := s.Get("/readyz")
		if err != nil {
			return err
		}
		for _, want := range says {
			if code != status || !strings.Contains(body, want) {
				return fmt.Errorf("%d: %s", code, body)
			}
		}
		return nil
	})
}

// metric wants a line of /metrics.
func (s *site) metric(line string) {
	s.t.Helper()
	_, body, err := s.Get("/metrics")
	if err != nil {
		s.t.Fatal(err)
	}
	if !strings.Contains(body, "\n"+line+"\n") {
		s.t.Errorf("the metrics do not hold %q", line)
	}
}

func (s *site) stored() []byte {
	s.t.Helper()
	b, err := os.ReadFile(s.Path("state/keyring.json"))
	if err != nil {
		s.t.Fatal(err)
	}
	return b
}

// vaultSlot is the slot as it is stored.
func (s *site) vaultSlot() seal.Slot {
	s.t.Helper()
	untrusted, err := keyring.Parse(s.stored())
	if err != nil {
		s.t.Fatal(err)
	}
	for _, slot := range untrusted.Slots() {
		if slot.Type == seal.TypeVault {
			return slot
		}
	}
	s.t.Fatal("the keyring holds no slot of Vault")
	return seal.Slot{}
}

// checkSaidNoSecret searches the log, which is at its debug level, and all that the
// commands printed, for the KEK and the credentials of now.
func (s *site) checkSaidNoSecret() {
	s.t.Helper()
	log, err := os.ReadFile(s.Path("kleidi.log"))
	if err != nil {
		s.t.Fatal(err)
	}
	if !bytes.Contains(log, []byte("level=")) {
		s.t.Fatalf("the log says nothing:\n%s", log)
	}
	secrets := secretsOf(s.t, s.scene)
	kek, err := s.scene.w.Unwrap(s.t.Context(), s.vaultSlot())
	if err != nil {
		s.t.Fatal(err)
	}
	defer kek.Close()
	kek.With(func(b []byte) { secrets["KEK of the node"] = bytes.Clone(b) })
	secrets["seed"] = seed
	findIn(s.t, "the log", string(log), secrets)
	findIn(s.t, "what was printed", s.said.String(), secrets)
}

// serveFaults are those of the wrapper, and what only a whole kleidi shows.
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

// TestServeFaults: whatever is wrong with Vault, a kleidi that is open goes on, a
// rotation changes nothing, a kleidi that starts is locked and says why, and opens
// by itself once it is mended.
func TestServeFaults(t *testing.T) {
	t.Parallel()
	s := newSite(t, "[vault]")
	for _, row := range serveFaults {
		t.Run(row.name, func(t *testing.T) {
			outer := s.t
			s.t = t
			defer func() { s.t = outer }()
			row.serve(s)
		})
	}
	s.run("rotate")
	s.run("slot test", "opens")
	s.decrypts()
	s.checkSaidNoSecret()
}

func (row fault) serve(s *site) {
	s.t.Helper()
	before := s.stored()
	row.break_(s.scene)
	if row.wraps {
		s.refuse("rotate", append(row.says, "wrap the new KEK as the vault slot is")...)
	}
	if row.opens {
		s.refuse("slot test", append(row.says, "DOES NOT OPEN")...)
	}
	s.waitSays(http.StatusOK, "ok")
	s.decrypts()
	s.restart()
	if row.opens {
		s.waitSays(http.StatusServiceUnavailable, append(row.says, "locked: "+string(row.cause))...)
		s.run("status --quick", append(row.says, "locked")...)
	}
	if !bytes.Equal(before, s.stored()) {
		s.t.Error("the keyring was changed")
	}
	row.mend(s.scene)
	s.WaitOpen()
	s.decrypts()
}

// TestServeSkipsSlot: a rotation does without a slot where it is told to, says so
// until the slot is there again, and keeps no way back that looks whole.
func TestServeSkipsSlot(t *testing.T) {
	t.Parallel()
	s := newSite(t, "[tpm, vault]")
	s.run("slot test", "tpm", "vault")
	before := s.stored()
	s.scene.gate.shut()
	s.refuse("rotate", "wrap the new KEK as the vault slot is", "connection refused", "start the server, or correct vault.address")
	if !bytes.Equal(before, s.stored()) {
		t.Error("a refused rotation changed the keyring")
	}
	s.refuse("rotate --skip-slot vaults", `there is no slot "vaults"`)
	s.refuse("rotate --skip-slot tpm", "connection refused")
	s.refuse("rotate --skip-slot tpm --skip-slot vault", "no slot would be left")
	s.run("rotate --skip-slot vault")
	for _, command := range []string{"slot list", "status"} {
		if !regexp.MustCompile(`(?m)^(slot +)?vault .*left out by the rotation`).MatchString(s.run(command)) {
			t.Errorf("kleidi %s does not say that the slot of vault is missing", command)
		}
	}
	s.run("rotate") // the next one leaves it out as well
	s.run("status", "left out by the rotation")
	s.refuse("slot test", "DOES NOT OPEN", "run kleidi slot add vault once its backend answers")
	s.refuse("slot add vault", "connection refused")
	s.restart()
	s.WaitOpen()
	s.waitSays(http.StatusOK, "self-test: slot vault does not open", "run kleidi slot add vault")
	s.metric("kleidi_self_test_failed_slots 1")

	s.scene.gate.open()
	s.run("slot add vault", "the KEK is wrapped by vault as well")
	if out := s.run("status") + s.run("slot list"); strings.Contains(out, "left out") {
		t.Errorf("it is mended, and still shown:\n%s", out)
	}
	s.run("slot test", "vault")
	s.decrypts()
	s.checkSaidNoSecret()
}

// TestServeFallsBack: a TPM that refuses gives way to Vault, loudly; with Vault away
// too kleidi is locked, tells of both, and opens by itself.
func TestServeFallsBack(t *testing.T) {
	t.Parallel()
	s := newSite(t, "[tpm, vault]")
	s.metric("kleidi_fallback 0")
	other := s.Kernel
	other.Kernel = "6.1.0-666-amd64"
	s.Serving.Stop()
	s.Reboot(other)

	s.scene.gate.shut()
	s.Serve()
	s.waitSays(http.StatusServiceUnavailable, "locked: boot-state-not-authorized", "PCR 4", "connection refused")
	s.run("status", "did not boot as it did", "connection refused")
	s.scene.gate.open()
	s.WaitOpen()
	s.waitSays(http.StatusOK, "fallback: opened by vault, since: the machine did not boot as it did")
	s.metric("kleidi_fallback 1")
	s.metric("kleidi_open 1")
	s.run("status", "opened by vault, since what comes before it in unlock.order did not")
	s.decrypts()
	log, err := os.ReadFile(s.Path("kleidi.log"))
	if err != nil {
		t.Fatal(err)
	}
	wantIn(t, "the log", string(log), []string{"opened by a fallback"})

	s.run("rotate")
	s.restart()
	s.WaitOpen()
	s.decrypts()
	s.run("reseal")
	s.restart()
	s.WaitOpen()
	s.metric("kleidi_fallback 0")
	s.decrypts()
	s.checkSaidNoSecret()
}

// TestServeWithoutFallback: a slot that is not in unlock.order opens nothing.
func TestServeWithoutFallback(t *testing.T) {
	t.Parallel()
	s := newSite(t, "[tpm]")
	s.run("slot add vault", "it opens nothing at start until unlock.order names vault")
	other := s.Kernel
	other.Kernel = "6.1.0-666-amd64"
	s.Serving.Stop()
	s.Reboot(other)
	s.Serve()
	s.WaitLocked("PCR 4")
}

// TestServeVersions: a slot outlives its key's rotation, is moved, and a setting that
// locks it out is found while kleidi is open.
func TestServeVersions(t *testing.T) {
	t.Parallel()
	s := newSite(t, "[vault]")
	f := s.scene
	f.must("transit/keys/kleidi/rotate", nil)
	s.restart()
	s.WaitOpen()
	s.run("slot test", "opens", "run kleidi slot rewrap before you raise min_decryption_version")
	s.run("slot list", "version 1")
	s.run("slot rewrap vault", "version 2")
	f.must("transit/keys/kleidi/config", map[string]any{"min_decryption_version": 2})
	if out := s.run("slot test", "opens"); strings.Contains(out, "rewrap") {
		t.Errorf("the slot is of the newest version:\n%s", out)
	}
	s.restart()
	s.WaitOpen()

	t.Log("raised too early")
	f.must("transit/keys/kleidi/rotate", nil)
	f.must("transit/keys/kleidi/config", map[string]any{"min_decryption_version": 3})
	s.refuse("slot test", "DOES NOT OPEN", "min_decryption_version is above the slot's version")
	s.waitSays(http.StatusOK, "self-test: slot vault does not open", "min_decryption_version")
	s.metric("kleidi_self_test_failed_slots 1")
	s.decrypts()
	s.run("slot rewrap vault", "version 3") // the KEK is open, so the old version isn't needed
	s.run("slot test", "opens")
	s.restart()
	s.WaitOpen()
	s.decrypts()
	s.checkSaidNoSecret()
}

// TestServeDownDuringUnlock: the server goes while it is asked.
func TestServeDownDuringUnlock(t *testing.T) {
	t.Parallel()
	s := newSite(t, "[vault]")
	s.Serving.Stop()
	s.scene.gate.stall()
	s.Serve()
	node.Eventually(t, 10*time.Second, "kleidi asks Vault", func() error {
		if s.scene.gate.asked() == 0 {
			return errors.New("no connection")
		}
		return nil
	})
	s.waitSays(http.StatusServiceUnavailable, "locked: starting")
	s.scene.gate.shut()
	s.waitSays(http.StatusServiceUnavailable, "locked: backend-unavailable")
	s.scene.gate.open()
	s.WaitOpen()
	s.decrypts()
}
