package ha

import (
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/cluster"
	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/e2e/threenodes"
)

type machine = threenodes.Machine

// controlPlane is three nodes over one etcd.
type controlPlane struct{ *threenodes.ControlPlane }

func newControlPlane(t *testing.T, encrypt string) *controlPlane {
	t.Helper()
	return &controlPlane{threenodes.New(t, encrypt)}
}

var must = threenodes.Must

// leader returns the etcd member that leads.
func (c *controlPlane) leader(t *testing.T) (leader *cluster.Etcd) {
	t.Helper()
	node.Eventually(t, 2*time.Minute, "a member of etcd leads", func() error {
		for _, e := range c.Etcd {
			if leads, err := e.Leads(); err == nil && leads {
				leader = e
				return nil
			}
		}
		return errors.New("none does")
	})
	return leader
}

// noLeader says that a write met an election of etcd, as a busy machine may cause one.
func noLeader(err error) bool { return err != nil && strings.Contains(err.Error(), "etcdserver: ") }

// approve lets a machine join: the operator approves it on a node, by the boot policy of the
// first one. It returns the arguments of the printed command.
func (c *controlPlane) approve(t *testing.T, by, m *machine) []string {
	t.Helper()
	return by.Approve(m.Name, m.Node, c.Nodes[0].BootPolicy())
}

// admit approves a machine on a node, and runs the printed command on the machine.
func (c *controlPlane) admit(t *testing.T, by, m *machine) {
	t.Helper()
	args := c.approve(t, by, m)
	node.Again(t, 5*time.Minute, m.Name+" joins", func() error { _, err := m.Try("join", args...); return err }, node.JoinAgain...)
}

// everywhere checks that each node reads each of these Secrets.
func (c *controlPlane) everywhere(t *testing.T, names ...string) {
	t.Helper()
	for _, m := range c.Nodes {
		if err := cluster.Soon(func() error { return m.Holds(names...) }); err != nil {
			t.Error(err)
		}
	}
}

// writer writes Secrets through a node and reads each back, until it is stopped.
type writer struct {
	stop chan struct{}
	done chan error
	n    atomic.Int64
}

func write(m *machine, prefix string) *writer {
	w := &writer{stop: make(chan struct{}), done: make(chan error, 1)}
	go func() {
		for {
			select {
			case <-w.stop:
				w.done <- nil
				return
			default:
			}
			name := fmt.Sprint(prefix, "-", w.n.Load())
			if err := errors.Join(m.Put(name), m.Holds(name)); noLeader(err) {
				select {
				case <-w.stop:
				case <-time.After(200 * time.Millisecond):
				}
				continue
			} else if err != nil {
				w.done <- err
				return
			}
			w.n.Add(1)
		}
	}()
	return w
}

// end stops the writer. None of its writes and reads may have failed.
func (w *writer) end(t *testing.T) {
	t.Helper()
	close(w.stop)
	if err := <-w.done; err != nil {
		t.Errorf("after %d Secrets: %v", w.n.Load(), err)
	}
	if w.n.Load() == 0 {
		t.Error("no Secret was written meanwhile")
	}
}
