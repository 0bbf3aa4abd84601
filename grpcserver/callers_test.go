package grpcserver_test

import (
	"fmt"
	"sync"
	"testing"
	"time"

	kmsapi "k8s.io/kms/apis/v2"

	"github.com/beezy-dev/kleidi/grpcserver"
	"github.com/beezy-dev/kleidi/seal"
)

// told are the calls of Callers, with a number for each connection.
type told struct {
	calls chan string
	mu    sync.Mutex
	conns map[any]int
}

func (c *told) number(conn any) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.conns[conn]; !ok {
		c.conns[conn] = len(c.conns) + 1
	}
	return c.conns[conn]
}

func (c *told) Answered(conn any, id seal.KeyID, encrypted bool) {
	c.calls <- fmt.Sprint(c.number(conn), " ", id, " ", encrypted)
}

func (c *told) Ended(conn any) { c.calls <- fmt.Sprint(c.number(conn), " ended") }

// TestCallers: the callers learn each key ID with the connection to which it was given, and
// the end of that connection. A refused call gives none.
func TestCallers(t *testing.T) {
	callers := &told{calls: make(chan string, 10), conns: map[any]int{}}
	keys := newKeys(t, "k1-a", "k1-b")
	r := startFor(t, keys, callers, grpcserver.ListenConfig{})
	want := func(text string) {
		t.Helper()
		select {
		case got := <-callers.calls:
			if got != text {
				t.Errorf("%s, want %s", got, text)
			}
		case <-time.After(2 * time.Minute):
			t.Fatalf("nobody is told: %s", text)
		}
	}
	ctx, first, second := limited(t), r.conn(t), r.conn(t)
	ask := func(c kmsapi.KeyManagementServiceClient) {
		t.Helper()
		if _, err := c.Status(ctx, &kmsapi.StatusRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	one, two := kmsapi.NewKeyManagementServiceClient(first), kmsapi.NewKeyManagementServiceClient(second)
	ask(one)
	want("1 k1-b false")
	keys.use("k1-a")
	ask(two)
	want("2 k1-a false")
	if _, err := one.Encrypt(ctx, &kmsapi.EncryptRequest{}); err == nil {
		t.Error("no plaintext is encrypted")
	}
	if _, err := one.Encrypt(ctx, &kmsapi.EncryptRequest{Plaintext: []byte("seed")}); err != nil {
		t.Fatal(err)
	}
	want("1 k1-a true")
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
	want("2 ended")
}

// TestOwnPing: this process is no caller.
func TestOwnPing(t *testing.T) {
	callers := &told{calls: make(chan string, 10), conns: map[any]int{}}
	r := startFor(t, newKeys(t, "k1-a"), callers, grpcserver.ListenConfig{Self: true})
	if _, err := kmsapi.NewKeyManagementServiceClient(r.conn(t)).Status(limited(t), &kmsapi.StatusRequest{}); err != nil {
		t.Fatal(err)
	}
	select {
	case got := <-callers.calls:
		t.Errorf("the callers are told: %s", got)
	default:
	}
}
