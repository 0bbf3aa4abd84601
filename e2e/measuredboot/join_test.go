package measuredboot

import (
	"context"
	"encoding/json"
	"os"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	kmsapi "k8s.io/kms/apis/v2"

	"github.com/beezy-dev/kleidi/e2e/measuredboot/guest/disk"
	"github.com/beezy-dev/kleidi/e2e/measuredboot/guest/wire"
	"github.com/beezy-dev/kleidi/e2e/node"
)

// seat is a node on the machine that runs the test, which a test machine joins. It
// judges the machine's boot by the boot policy of the machine's first boot.
type seat struct {
	t      *testing.T
	node   *node.Node
	ek     string // the digest of the machine's EK
	policy string // the boot policy's file
}

// joinName is the machine's name among the seat's nodes.
const joinName = "cp-2"

// joiner configures a second kleidi on the machine, which has no keyring.
var joiner = disk.File{Name: "etc/joiner.yaml", Mode: 0o600, Data: []byte(`apiVersion: kleidi.beezy.dev/v1alpha1
kind: KleidiConfiguration
node: ` + joinName + `
state:
  dir: /tmp/joiner
` + patientTPM)}

// newSeat starts a node that answers machines with a network.
func newSeat(t *testing.T) *seat {
	t.Helper()
	port := node.FreePort(t)
	n := node.Make(t, node.Setup{Settings: "node: cp-1\njoin:\n  listen: 127.0.0.1:" + port + "\n  advertise: " + wire.Host + ":" + port + "\n"})
	n.ServeOpen()
	return &seat{t: t, node: n, policy: n.Path("machine.yaml")}
}

// ask lists the steps of a machine that shows its EK and its boot.
var ask = []wire.Step{kleidi("node", "identity", "-o", "json"), kleidi("bootpolicy", "record")}

// learn reads the results of these steps.
func (s *seat) learn(t *testing.T, b *booted) {
	t.Helper()
	for _, r := range b.results[1:] {
		switch line := strings.Join(r.Step.Run, " "); {
		case strings.HasSuffix(line, "node identity -o json"):
			var identity struct{ EK string }
			if err := json.Unmarshal([]byte(r.Stdout), &identity); err != nil {
				t.Error(err)
			}
			s.ek = identity.EK
		case strings.HasSuffix(line, "bootpolicy record"):
			if err := os.WriteFile(s.policy, []byte(r.Stdout), 0o600); err != nil {
				t.Error(err)
			}
		}
	}
	if s.ek == "" {
		t.Error("kleidi node identity names no EK")
	}
}

// admit approves the machine, and returns the steps that run the printed command there,
// with the machine's own kleidi stopped.
func (s *seat) admit() []wire.Step {
	s.t.Helper()
	said := strings.TrimSpace(string(s.node.Run("node", "approve", joinName, "--ek", s.ek, "--boot-policy", s.policy)))
	command := strings.Fields(said[strings.LastIndex(said, "\n")+1:])
	join := kleidi(append(command[1:], "--config", "/"+joiner.Name)...)
	join.Again = "check that kleidi serve runs there" // the seat gives a peer 3 s for its hello and 15 s for its proof
	return []wire.Step{{Stop: true}, join}
}

// serveJoined are the steps of a machine that has joined: it decrypts a DEK seed that the
// seat has encrypted.
func (s *seat) serveJoined(seed []byte) []wire.Step {
	s.t.Helper()
	return []wire.Step{{Serve: true, Config: "/" + joiner.Name}, {Decrypt: s.encrypt(seed)}}
}

func (s *seat) encrypt(seed []byte) *wire.Sealed {
	s.t.Helper()
	conn := must[*grpc.ClientConn](s.t)(grpc.NewClient("unix://"+s.node.Path("run/kms.sock"), grpc.WithTransportCredentials(insecure.NewCredentials())))
	defer conn.Close()
	ctx, cancel := context.WithTimeout(s.t.Context(), bootTime)
	defer cancel()
	res := must[*kmsapi.EncryptResponse](s.t)(kmsapi.NewKeyManagementServiceClient(conn).Encrypt(ctx, &kmsapi.EncryptRequest{Uid: "seed", Plaintext: seed}))
	return &wire.Sealed{KeyID: res.KeyId, Ciphertext: res.Ciphertext, Annotations: res.Annotations}
}

// has checks whether the seat lists the machine as a node that has joined.
func (s *seat) has(t *testing.T, want bool) {
	t.Helper()
	list := string(s.node.Run("node", "list"))
	if got := strings.Contains(list, joinName) && !strings.Contains(list, "has not finished"); got != want {
		t.Errorf("the machine has joined: %v, want %v; kleidi node list:\n%s", got, want, list)
	}
}
