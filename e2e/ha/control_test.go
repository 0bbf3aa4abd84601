package ha

import (
	"errors"
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/beezy-dev/kleidi/e2e/cluster"
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
func (c *controlPlane) leader(t *testing.T) *cluster.Etcd {
	t.Helper()
	for _, e := range c.Etcd {
		leads, err := e.Leads()
		must(t, err)
		if leads {
			return e
		}
	}
	t.Fatal("no member of etcd leads")
	return nil
}

// approve lets a machine join: the operator approves it on a node, by the boot policy of the
// first one. It returns the arguments of the printed command.
func (c *controlPlane) approve(t *testing.T, by, m *machine) []string {
	t.Helper()
	return by.Approve(m.Name, m.Node, c.Nodes[0].BootPolicy())
}

// admit approves a machine on a node, and runs the printed command on the machine.
func (c *controlPlane) admit(t *testing.T, by, m *machine) {
	t.Helper()
	m.Run("join", c.approve(t, by, m)...)
}

// everywhere checks that each node reads each of these Secrets.
func (c *controlPlane) everywhere(t *testing.T, names ...string) {
	t.Helper()
	for _, m := range c.Nodes {
		if err := m.Holds(names...); err != nil {
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
			if err := errors.Join(m.Put(name), m.Holds(name)); err != nil {
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
