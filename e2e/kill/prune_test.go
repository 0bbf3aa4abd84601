package kill

import (
	"context"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/beezy-dev/kleidi/internal/usage/usagetest"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// bareEtcd answers as an etcd in which one Secret is stored, under no key of the
// keyring's.
func bareEtcd(t *testing.T) (url string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	field := func(b []byte, n protowire.Number, value []byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), value)
	}
	number := func(b []byte, n protowire.Number, value uint64) []byte {
		return protowire.AppendVarint(protowire.AppendTag(b, n, protowire.VarintType), value)
	}
	header := number(number(nil, 1, 7), 3, 9)                                                                     // cluster, revision
	secret := field(field(nil, 1, []byte("/registry/secrets/a/b")), 5, usagetest.Encrypted("kleidi", "k1-other")) // key, value
	s := grpc.NewServer(grpc.ForceServerCodec(bytesCodec{}), grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		var request []byte
		if err := stream.RecvMsg(&request); err != nil {
			return err
		}
		answer := field(nil, 1, header)
		if _, _, n := protowire.ConsumeTag(request); n > 0 {
			if key, _ := protowire.ConsumeBytes(request[n:]); string(key) == "/registry/" {
				answer = number(field(answer, 2, secret), 4, 1)
			}
		}
		return stream.SendMsg(&answer)
	}))
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
	return "http://" + l.Addr().String()
}

type bytesCodec struct{}

func (bytesCodec) Marshal(v any) ([]byte, error)      { return *v.(*[]byte), nil }
func (bytesCodec) Unmarshal(data []byte, v any) error { *v.(*[]byte) = data; return nil }
func (bytesCodec) Name() string                       { return "proto" }

// TestPruneKilled kills serve, and then the command, before each step of a prune. The
// retired KEK is in the keyring or in the archive at every moment, and the command can be
// run again.
func TestPruneKilled(t *testing.T) {
	t.Parallel()
	m := newMachine(t)
	m.configure("")
	recipient := m.identity()
	m.Reboot(usual)
	m.run("init --recovery-recipient " + recipient)
	old := m.show().Current.KeyID
	m.run("rotate")
	start := m.off(usual)
	verb := "prune " + old + " --etcd " + bareEtcd(t) + " --yes"
	for _, by := range []string{"serve", "command"} {
		steps := 0
		for killed := true; killed; steps++ {
			m.restore(start)
			killed = m.pruneKilled(t, verb, by, victim{onDisk, steps + 1})
			m.holdsSomewhere(t, old)
			m.run("keyring verify")
			m.pruneAgain(t, verb, old)
			if t.Failed() {
				t.Fatalf("the %s was killed: %v, before step %d", by, killed, steps+1)
			}
		}
		if steps < 5 {
			t.Errorf("the %s was killed before %d steps; are system calls still recognised?", by, steps-1)
		}
		t.Logf("the %s was killed before each of %d steps", by, steps-1)
	}
}

// pruneKilled runs serve, which kube-apiserver asks, and the command; one of the two is
// killed before a step.
func (m *machine) pruneKilled(t *testing.T, verb, by string, who victim) (killed bool) {
	t.Helper()
	c := m.client(newHistory())
	defer c.conn.Close()
	if by == "command" {
		p := release(t, m.path("serve.log"), m.command("serve"))
		m.waitOpen(c, p)
		command := trace(t, m.stateDir(), m.path("output"), who, m.command(verb))
		ok := command.wait()
		if _, killed = command.reached(); !killed && !ok {
			t.Errorf("kleidi %s: %s", verb, command.said())
		}
		p.signal(unix.SIGTERM)
		p.wait()
		return killed
	}
	p := trace(t, m.stateDir(), m.path("serve.log"), victim{}, m.command("serve"))
	m.waitOpen(c, p)
	p.arm(who)
	_, err := m.try(verb)
	_, killed = p.reached()
	if err != nil && !killed {
		t.Errorf("serve was not killed: %v\n%s", err, p.said())
	}
	p.signal(unix.SIGTERM)
	p.wait()
	return killed
}

// pruneAgain ends what was interrupted, and runs serve on the result.
func (m *machine) pruneAgain(t *testing.T, verb, old string) {
	t.Helper()
	p := release(t, m.path("serve.log"), m.command("serve"))
	c := m.client(newHistory())
	defer c.conn.Close()
	m.waitOpen(c, p)
	if _, err := m.try(verb); err != nil && !strings.Contains(err.Error(), "is not that of a retired KEK") {
		t.Errorf("run again: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := c.decrypts(ctx); err != nil {
		t.Error(err)
	}
	p.signal(unix.SIGTERM)
	p.wait()
	if slices.Contains(m.show().ids(), old) {
		t.Error("the retired KEK is still in the keyring")
	}
	m.holdsSomewhere(t, old)
}

// holdsSomewhere: a keyring in the state folder, other than the previous revision, holds
// the KEK: the stored one, or the archive.
func (m *machine) holdsSomewhere(t *testing.T, id string) {
	t.Helper()
	var found []string
	for name, b := range m.files("state") {
		if name != "keyring.json" && !strings.HasPrefix(name, "archive-") || strings.HasSuffix(name, ".new") {
			continue
		}
		u, err := keyring.Parse(b)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		for _, r := range u.Info().Retired {
			if string(r.KeyID) == id {
				found = append(found, name)
			}
		}
	}
	if len(found) == 0 {
		t.Errorf("the KEK %s is lost", id)
	}
}
