package ha

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	kmsapi "k8s.io/kms/apis/v2"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/seal/store/kube/kubetest"
)

// beforeStore is a commit that reads format 2, and has neither join nor a cluster store.
const beforeStore = "fd2e8c2"

// TestOlderNode: a node whose serve is an older binary, which reads format 2 and knows no
// cluster store, serves beside a node with the present one, from a copy of the state folder
// that the present binary keeps on its machine. What either encrypts, the other decrypts:
// before a rotation, while a KEK is staged, and once the rotation is over and the folder was
// copied again. A checkout without history has the present binary in the older one's place.
// Two limits show: the older binary refuses the keyring as long as a KEK is
// staged in it, and without the copy it does not decrypt what is under the fresh KEK.
func TestOlderNode(t *testing.T) {
	binary := olderBinary(t, beforeStore)
	hasHistory := binary != ""
	if !hasHistory {
		binary = node.Binary(t)
	}
	api, err := kubetest.Start()
	must(t, err)
	t.Cleanup(api.Stop)
	first := node.Make(t, node.Setup{Settings: "node: cp-1\n"})
	must(t, os.WriteFile(first.Path("kubeconfig"), api.Kubeconfig(), 0o600))
	first.Configure("node: cp-1\njoin:\n  listen: 127.0.0.1:" + node.FreePort(t) + "\ncluster:\n  kubeconfig: " + first.Path("kubeconfig") + "\n")
	second := node.Make(t, node.Setup{Settings: "node: cp-2\n", Uninitialised: true})
	older := olderNode{second, binary, strings.NewReplacer(second.Path("state"), second.Path("older"), second.Path("run/admin.sock"), second.Path("run/older.sock"), second.Path("run/http.sock"), second.Path("run/older-http.sock"))}
	copied := func() {
		t.Helper()
		must(t, errors.Join(os.RemoveAll(second.Path("older")), os.CopyFS(second.Path("older"), os.DirFS(second.Path("state"))), os.Chmod(second.Path("older"), 0o700)))
	}
	first.ServeOpen()
	first.Admit("cp-2", second)
	copied()
	older.serve(t)
	m := &mixed{t: t, clients: []kmsapi.KeyManagementServiceClient{clientOf(t, first), clientOf(t, second)}}
	m.encrypt()
	m.decrypt(0, "")
	m.decrypt(1, "")
	former := m.keyID(0)
	m.announces(1, former)

	t.Log("a KEK is staged")
	carry(t, second, first) // the record by which the newer node wraps the KEK
	if out, err := first.Try("rotate", "--wait", "--timeout", "20s"); err == nil || !strings.Contains(string(out)+err.Error(), "node cp-2: ") {
		t.Fatalf("a rotation does not wait for the older node: %v\n%s", err, out)
	}
	carry(t, first, second)
	if hasHistory {
		refuses(t, binary, second, second.Path("config.yaml"), first.Identity, "staged.by")
	}
	m.encrypt()
	m.decrypt(0, "")
	m.decrypt(1, "")
	m.announces(0, former)
	m.announces(1, former)

	t.Log("the KEK is current on the newer node alone")
	carry(t, second, first)
	node.Eventually(t, 2*time.Minute, "the newer node announces another KEK", func() error {
		if id := m.keyID(0); id == former {
			return fmt.Errorf("it announces %s", id)
		}
		return nil
	})
	m.encrypt()
	m.decrypt(0, "")
	m.decrypt(1, m.keyID(0))
	m.announces(1, former)

	t.Log("the KEK is current on both nodes")
	carry(t, first, second)
	older.Serving.Stop()
	copied()
	older.serve(t)
	m.encrypt()
	m.decrypt(0, "")
	m.decrypt(1, "")
	m.announces(1, m.keyID(0))
}

// carry takes the shared keyring and the record of one node to another.
func carry(t *testing.T, from, to *node.Node) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "export")
	from.Run("keyring", "export", file)
	to.Run("keyring", "import", file)
}

// TestUpgrade: kleidi as it was before it supported several nodes serves a keyring that it
// has made, and is replaced with the present version, and back again, while a caller encrypts
// and decrypts all the time. No call fails that arrives at a server, whatever version
// encrypted and whatever version decrypts, and the key ID stays.
func TestUpgrade(t *testing.T) {
	present := node.Make(t, node.Setup{Settings: "node: cp-1\n", Uninitialised: true})
	// The older binary knows no http.socket.
	n := olderNode{present, olderBinary(t, beforeSeveral), strings.NewReplacer("socket: "+present.Path("run/http.sock"), "address: 127.0.0.1:"+node.FreePort(t))}
	if n.binary == "" {
		n.binary, n.differs = node.Binary(t), strings.NewReplacer()
	}
	n.run(t, "init", "--recovery-recipient", "age1lggyhqrw2nlhcxprm67z43rta597azn8gknawjehu9d9dl0jq3yqqvfafg")
	made, err := os.ReadFile(n.Path("state/keyring.json"))
	must(t, err)
	m := &mixed{t: t, clients: []kmsapi.KeyManagementServiceClient{clientOf(t, n.Node)}}
	var during *endless
	for i, step := range []struct {
		binary string
		serve  func()
	}{{"the older one", func() { n.serve(t) }}, {"the present one", n.ServeOpen}, {"the older one again", func() { n.serve(t) }}, {"the present one again", n.ServeOpen}} {
		if i > 0 {
			n.Serving.Stop()
		}
		t.Log("the binary is " + step.binary)
		step.serve()
		m.encrypt()
		m.decrypt(0, "")
		m.announces(0, m.objects[0].KeyId)
		if i == 0 {
			during = m.endlessly()
		}
		during.answered(t, 20)
	}
	during.end(t)
	if now, err := os.ReadFile(n.Path("state/keyring.json")); err != nil || !bytes.Equal(now, made) {
		t.Errorf("the keyring has changed without a command: %v", err)
	}

	t.Log("the older binary reads the keyring that the present one has rotated")
	former := m.keyID(0)
	n.Run("rotate")
	m.encrypt()
	m.decrypt(0, "")
	n.Serving.Stop()
	n.serve(t)
	m.encrypt()
	m.decrypt(0, "")
	if m.keyID(0) == former {
		t.Errorf("key ID %s is still current", former)
	}
}

// olderNode is a machine whose serve is an older binary.
type olderNode struct {
	*node.Node
	binary  string
	differs *strings.Replacer // makes the older binary's configuration out of the present one's
}

// config writes the configuration for the older binary, and returns its path.
func (n olderNode) config(t *testing.T) string {
	t.Helper()
	present, err := os.ReadFile(n.Path("config.yaml"))
	must(t, err)
	must(t, os.WriteFile(n.Path("older.yaml"), []byte(n.differs.Replace(string(present))), 0o600))
	return n.Path("older.yaml")
}

// serve starts the older binary, and returns once its KEK is open.
func (n olderNode) serve(t *testing.T) {
	t.Helper()
	n.Serving = node.Start(t, n.Path("older.log"), n.binary, "serve", "--config", n.config(t))
	client := clientOf(t, n.Node)
	node.Eventually(t, 2*time.Minute, "the older binary is open", func() error {
		if err := n.Serving.Alive(); err != nil {
			t.Fatal(err)
		}
		s, err := client.Status(t.Context(), &kmsapi.StatusRequest{})
		if err == nil && s.Healthz != "ok" {
			err = fmt.Errorf("healthz: %s", s.Healthz)
		}
		return err
	})
}

// run runs a command of the older binary.
func (n olderNode) run(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command(n.binary, append(args, "--config", n.config(t))...).CombinedOutput(); err != nil {
		t.Fatalf("the older kleidi %s: %v\n%s", args[0], err, out)
	}
}

// clientOf calls a node's KMS socket as kube-apiserver does. A call waits until a server
// listens there.
func clientOf(t *testing.T, n *node.Node) kmsapi.KeyManagementServiceClient {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+n.Path("run/kms.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)), grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1, MaxDelay: 50 * time.Millisecond}, MinConnectTimeout: 20 * time.Second}))
	must(t, err)
	t.Cleanup(func() { conn.Close() })
	return kmsapi.NewKeyManagementServiceClient(conn)
}

// callTime is far above the time of a call to a server that is open.
const callTime = 2 * time.Minute

// object is a DEK seed as etcd holds it.
type object struct {
	seed string
	*kmsapi.EncryptResponse
}

func encrypt(client kmsapi.KeyManagementServiceClient, seed string) (object, error) {
	ctx, cancel := context.WithTimeout(context.Background(), callTime)
	defer cancel()
	res, err := client.Encrypt(ctx, &kmsapi.EncryptRequest{Uid: seed, Plaintext: []byte(seed)})
	return object{seed, res}, err
}

func decrypt(client kmsapi.KeyManagementServiceClient, o object) error {
	ctx, cancel := context.WithTimeout(context.Background(), callTime)
	defer cancel()
	res, err := client.Decrypt(ctx, &kmsapi.DecryptRequest{Uid: o.seed, Ciphertext: o.Ciphertext, KeyId: o.KeyId, Annotations: o.Annotations})
	if err == nil && string(res.Plaintext) != o.seed {
		err = fmt.Errorf("%q is decrypted as %q", o.seed, res.Plaintext)
	}
	return err
}

// mixed are the KMS sockets of nodes, and the objects that were encrypted through them.
type mixed struct {
	t       *testing.T
	clients []kmsapi.KeyManagementServiceClient
	objects []object
}

// encrypt encrypts an object through each socket, under the key ID that it announces.
func (m *mixed) encrypt() {
	m.t.Helper()
	for i, client := range m.clients {
		o, err := encrypt(client, fmt.Sprintf("object %d", len(m.objects)))
		must(m.t, err)
		m.announces(i, o.KeyId)
		m.objects = append(m.objects, o)
	}
}

// decrypt decrypts all objects through a socket, however long ago and through whichever
// socket they were encrypted. It demands that objects under an unknown key ID, if one is
// given, are refused.
func (m *mixed) decrypt(through int, unknown string) {
	m.t.Helper()
	for _, o := range m.objects {
		if err := decrypt(m.clients[through], o); o.KeyId == unknown && status.Code(err) != codes.NotFound || o.KeyId != unknown && err != nil {
			m.t.Fatalf("socket %d is asked for %s, which is under %s: %v", through, o.seed, o.KeyId, err)
		}
	}
}

// announces demands that a socket announces a key ID.
func (m *mixed) announces(socket int, id string) {
	m.t.Helper()
	if now := m.keyID(socket); now != id {
		m.t.Errorf("socket %d announces %s, and not %s", socket, now, id)
	}
}

// keyID is the key ID that a socket announces.
func (m *mixed) keyID(of int) string {
	m.t.Helper()
	s, err := m.clients[of].Status(m.t.Context(), &kmsapi.StatusRequest{})
	must(m.t, err)
	return s.KeyId
}

// endless encrypts and decrypts until it is ended.
type endless struct {
	stop   chan struct{}
	ended  chan error
	rounds atomic.Int64
	again  atomic.Int64
}

func (m *mixed) endlessly() *endless {
	e := &endless{stop: make(chan struct{}), ended: make(chan error, 1)}
	client := m.clients[0]
	go func() { e.ended <- e.run(client) }()
	return e
}

// run encrypts an object in each round, and decrypts one of the objects before it. A call is
// repeated if the server ended during the call, or has not opened its KEK yet.
func (e *endless) run(client kmsapi.KeyManagementServiceClient) error {
	var objects []object
	for {
		select {
		case <-e.stop:
			return nil
		default:
		}
		o, err := encrypt(client, fmt.Sprintf("endless %d", len(objects)))
		if err == nil {
			objects = append(objects, o)
			err = decrypt(client, objects[len(objects)/2])
		}
		switch {
		case err == nil:
			e.rounds.Add(1)
		case status.Code(err) == codes.Unavailable:
			e.again.Add(1)
		default:
			return err
		}
	}
}

// answered waits for some more rounds.
func (e *endless) answered(t *testing.T, rounds int64) {
	t.Helper()
	want := e.rounds.Load() + rounds
	node.Eventually(t, 2*time.Minute, "calls are answered", func() error {
		if now := e.rounds.Load(); now < want {
			return fmt.Errorf("%d rounds are missing", want-now)
		}
		return nil
	})
}

// end stops the calls, of which none may have failed.
func (e *endless) end(t *testing.T) {
	t.Helper()
	close(e.stop)
	must(t, <-e.ended)
	t.Logf("%d rounds; %d calls were repeated", e.rounds.Load(), e.again.Load())
}
