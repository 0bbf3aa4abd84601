package pkcs11

import (
	"context"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	kmsapi "k8s.io/kms/apis/v2"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/e2e/site"
	"github.com/beezy-dev/kleidi/grpcserver/kmsplugin"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/sealtest"
)

// Another KMS v2 plugin as a wrapper: e2e/servers/pkcs11plugin, a process of its own with a
// token of SoftHSM.

// peer is that plugin.
type peer struct {
	t       *testing.T
	token   *token
	socket  string
	program string
	cmd     *exec.Cmd
	env     []string // with the token's settings
}

func newPeer(t *testing.T, key string) *peer {
	t.Helper()
	k := newSoftHSM(t)
	p := &peer{t: t, token: k, socket: k.path("kms.sock"), program: binaryOfPlugin, env: os.Environ()}
	p.start(key)
	t.Cleanup(p.kill)
	return p
}

// start starts the plugin, which encrypts under key, and waits until it answers.
func (p *peer) start(key string) {
	p.t.Helper()
	p.startAs(key, 0)
}

func (p *peer) startAs(key string, uid uint32) {
	p.t.Helper()
	// The library's server does not replace the socket of a killed server.
	_ = os.Remove(p.socket)
	p.cmd = exec.Command(p.program, "-socket", p.socket, "-module", p.token.module, "-token", "kleidi", "-pin-file", p.token.path("pin"), "-key", key)
	p.cmd.Env, p.cmd.Stderr = p.env, os.Stderr
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	p.token.ok(p.cmd.Start())
	conn, err := grpc.NewClient("unix://"+p.socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"))
	p.token.ok(err)
	defer conn.Close()
	ctx, cancel := context.WithTimeout(p.t.Context(), 2*time.Minute)
	defer cancel()
	status, err := kmsapi.NewKeyManagementServiceClient(conn).Status(ctx, &kmsapi.StatusRequest{}, grpc.WaitForReady(true))
	p.token.ok(err)
	if status.KeyId != key {
		p.t.Fatalf("the plugin encrypts under %q, want %q", status.KeyId, key)
	}
}

// kill ends the plugin as a crash would. Its socket stays.
func (p *peer) kill() {
	if p.cmd.Process != nil {
		_ = p.cmd.Process.Kill()
		_ = p.cmd.Wait()
	}
}

func (p *peer) wrapper() *kmsplugin.Wrapper {
	p.t.Helper()
	w, err := kmsplugin.New(kmsplugin.Config{Socket: p.socket, Timeout: 30 * time.Second})
	p.token.ok(err)
	return w
}

// TestPluginConformance runs the wrappers' common suite. The other plugin has another token.
func TestPluginConformance(t *testing.T) {
	w, other := newPeer(t, "first").wrapper(), newPeer(t, "second").wrapper()
	sealtest.Run(t, func(*testing.T) sealtest.Harness {
		return sealtest.Harness{Wrapper: w, Other: other, OtherCause: seal.CauseUnavailable, Stride: 11}
	})
}

// TestPluginTwoOfTwoConformance runs the suite with a TPM and the plugin together.
func TestPluginTwoOfTwoConformance(t *testing.T) {
	w := newPeer(t, "first").wrapper()
	first, _ := site.NewTPM(t)
	elsewhere, _ := site.NewTPM(t)
	sealtest.Run(t, func(*testing.T) sealtest.Harness {
		return sealtest.Harness{Wrapper: site.Pair(first, w), Other: site.Pair(elsewhere, w), OtherCause: seal.CauseOtherTPM, Stride: 31}
	})
}

func (p *peer) site(order string, init ...string) *site.Site {
	p.t.Helper()
	return site.New(p.t, node.Setup{Binary: binary, Init: init, Settings: "unlock: {order: " + order + ", selfTest: 1m}\nkmsPlugin: {socket: " + p.socket + "}\nlog: {level: debug}"})
}

// TestPlugin runs the plugin beside the TPM, through a change of its key, a crash, an
// answer by another user's plugin, and a boot that the TPM refuses.
func TestPlugin(t *testing.T) {
	p := newPeer(t, "first")
	s := p.site("[tpm, kms-plugin]")
	s.Do("slot add kms-plugin", "the KEK is wrapped by kms-plugin as well: key first")
	s.EncryptSeed()

	t.Log("the plugin's key changes")
	p.kill()
	s.Refuse("slot test kms-plugin", "DOES NOT OPEN", p.socket)
	p.start("second")
	s.Do("slot test kms-plugin", "the plugin encrypts under key second now, and the slot was made under first")
	s.Do("slot rewrap kms-plugin", "second")
	if out := s.Do("slot test kms-plugin", "opens"); strings.Contains(out, "the plugin encrypts under") {
		t.Errorf("after rewrap: %s", out)
	}
	s.Do("rotate")
	s.Do("slot test", "kms-plugin")
	s.Decrypts()

	t.Log("the TPM refuses, and the plugin opens")
	was, other := s.Kernel, s.Kernel
	other.Kernel = "6.1.0-666-amd64"
	s.Serving.Stop()
	s.Reboot(other)
	s.Serve()
	s.WaitOpen()
	s.Decrypts()

	t.Log("neither opens: the plugin is killed, and then runs as another user")
	s.Serving.Stop()
	p.kill()
	s.Serve()
	s.WaitSays(http.StatusServiceUnavailable, "kms-plugin: nothing answers")
	s.RefusesCalls("kms-plugin: nothing answers")
	p.openToNobody()
	p.startAs("second", nobody)
	s.WaitSays(http.StatusServiceUnavailable, "belongs to UID 65534, who can change it; chown root")
	p.token.ok(os.Chown(p.token.dir, 0, 0))
	s.WaitSays(http.StatusServiceUnavailable, "UID 65534 listens")
	p.kill()
	p.start("second")
	s.WaitOpen()
	s.Decrypts()
	s.Serving.Stop()
	s.Reboot(was)
	s.Serve()
	s.WaitOpen()
	s.SaidNone(map[string][]byte{"PIN": []byte(p.token.pin), "KEK": p.kek(s.SlotOf("kms-plugin"))})
}

// nobody is a user without rights.
const nobody = 65534

// openToNobody lets the user nobody run the plugin, use the token and make the socket.
func (p *peer) openToNobody() {
	p.t.Helper()
	program, err := os.ReadFile(binaryOfPlugin)
	p.token.ok(err)
	p.program = p.token.path("pkcs11plugin")
	p.token.ok(os.WriteFile(p.program, program, 0o700))
	p.token.ok(os.Chmod(filepath.Dir(p.token.dir), 0o755))
	out, err := exec.Command("chown", "-R", "65534", p.token.dir).CombinedOutput()
	if err != nil {
		p.t.Fatalf("%v\n%s", err, out)
	}
}

func (p *peer) kek(slot seal.Slot) (copied []byte) {
	p.t.Helper()
	kek, err := p.wrapper().Unwrap(p.t.Context(), slot)
	p.token.ok(err)
	defer kek.Close()
	kek.With(func(b []byte) { copied = append(copied, b...) })
	return copied
}

// TestPluginTwoOfTwo: a node opens only with its TPM and the plugin together.
func TestPluginTwoOfTwo(t *testing.T) {
	p := newPeer(t, "first")
	s := p.site("[tpm-and-kms-plugin]", "--no-recovery", "--accept-data-loss")
	s.Do("status", "tpm-and-kms-plugin", "(opens now)")
	s.Do("rotate")
	s.EncryptSeed()
	s.Serving.Stop()
	p.kill()
	s.Serve()
	s.WaitSays(http.StatusServiceUnavailable, "locked: backend-unavailable", "nothing answers")
	p.start("first")
	s.WaitOpen()
	s.Decrypts()
	was, other := s.Kernel, s.Kernel
	other.Kernel = "6.1.0-666-amd64"
	s.Serving.Stop()
	s.Reboot(other)
	s.Serve()
	s.WaitSays(http.StatusServiceUnavailable, "locked: boot-state-not-authorized")
	s.Serving.Stop()
	s.Reboot(was)
	s.Serve()
	s.WaitOpen()
	s.Decrypts()
}
