package ha

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/e2e/threenodes"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	clusterstore "github.com/beezy-dev/kleidi/seal/store"
	"github.com/beezy-dev/kleidi/seal/store/kube"
)

// view is the state of a rotation as the cluster store shows it.
type view struct {
	current, staged, former seal.KeyID
	records                 []keyring.Record
}

// phase is a phase of a rotation. It has begun once reached is true.
type phase struct {
	name    string
	reached func(view) bool
}

var phases = []phase{
	{"stage", func(v view) bool { return v.staged != "" || v.current != v.former }},
	{"acknowledge", func(v view) bool {
		return v.current != v.former || v.some(func(r keyring.Record) bool { return v.staged != "" && r.Acknowledged == v.staged })
	}},
	{"activate", func(v view) bool { return v.current != v.former }},
	{"settle", func(v view) bool {
		return v.current != v.former && v.some(func(r keyring.Record) bool { return r.Announced == v.current })
	}},
}

func (v view) some(f func(keyring.Record) bool) bool {
	for _, r := range v.records {
		if f(r) {
			return true
		}
	}
	return false
}

// store returns the cluster store through the node's kube-apiserver.
func store(t *testing.T, m *machine) *kube.Store {
	t.Helper()
	client, err := kube.NewClient(kube.Options{Kubeconfig: m.Path("admin.conf")})
	must(t, err)
	return &kube.Store{Client: client}
}

// look reads the cluster store.
func (c *controlPlane) look(t *testing.T, s *kube.Store, former seal.KeyID) (v view, err error) {
	raw, err := s.Load(t.Context())
	if err != nil {
		return v, err
	}
	k, err := keyring.Parse(raw)
	if err != nil {
		return v, err
	}
	i := k.Info()
	v.former, v.current = former, i.Current.KeyID
	if i.Staged != nil {
		v.staged = i.Staged.KeyID
	}
	var names []string
	for _, m := range c.Nodes {
		names = append(names, m.Name)
	}
	all, err := s.Records(t.Context(), names...)
	for _, r := range all {
		if u, err := keyring.ParseRecord(r.Bytes); err == nil {
			v.records = append(v.records, u.Claims())
		}
	}
	return v, err
}

// until returns once a rotation has reached a phase, seen through a node.
func (c *controlPlane) until(t *testing.T, through *machine, former seal.KeyID, p phase) {
	t.Helper()
	s := store(t, through)
	deadline := time.Now().Add(5 * time.Minute)
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for range tick.C {
		v, err := c.look(t, s, former)
		if err == nil && p.reached(v) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the rotation does not reach the phase %q: %+v %v", p.name, v, err)
		}
	}
}

// rotate starts a rotation on a node, and calls do once it has reached a phase.
func (c *controlPlane) rotate(t *testing.T, by, through *machine, p phase, do func()) {
	t.Helper()
	former := seal.KeyID(by.List().KeyID)
	ended := make(chan struct{})
	reached := make(chan struct{})
	over := sync.OnceFunc(func() { close(reached) })
	defer over()
	go func() {
		defer close(ended)
		// The command ends with its serve, which may be killed. If the cluster store was away for
		// a moment, it has begun nothing.
		for {
			_, err := by.Try("rotate")
			if err == nil || strings.Contains(err.Error(), "exit status 3") && !strings.Contains(err.Error(), "nothing was changed") {
				return
			}
			select {
			case <-reached:
				return
			case <-time.After(200 * time.Millisecond):
			}
		}
	}()
	c.until(t, through, former, p)
	over()
	do()
	<-ended
}

// finish ends a rotation from a node, by driving it on or by aborting it. It reports whether
// the KEK is still the former one: it may have been too late to abort.
func (c *controlPlane) finish(t *testing.T, from *machine, former string, abort bool) (aborted bool) {
	t.Helper()
	verb := "--continue"
	if abort {
		verb = "--abort"
	}
	node.Eventually(t, 10*time.Minute, "the rotation is ended by "+verb, func() error {
		_, err := from.Try("rotate", verb, "--wait", "--timeout", "20s")
		if abort && err != nil && strings.Contains(err.Error(), "no KEK is staged") {
			return nil // it was too late to abort
		}
		return err
	})
	threenodes.InStep(t, c.Nodes...)
	aborted = from.List().KeyID == former
	if aborted && !abort {
		t.Errorf("the KEK is still %s", former)
	}
	c.stored(t)
	return aborted
}

// stored checks that the cluster store holds the keyring of the nodes, through each API.
func (c *controlPlane) stored(t *testing.T) {
	t.Helper()
	want := c.Nodes[0].List()
	for _, m := range c.Nodes {
		s := store(t, m)
		node.Eventually(t, 2*time.Minute, "the cluster store holds the nodes' keyring", func() error {
			raw, err := s.Load(t.Context())
			if err != nil {
				return err
			}
			k, err := keyring.Parse(raw)
			if err != nil {
				return err
			}
			if k.Revision() != want.Revision || string(k.CurrentID()) != want.KeyID || k.Info().Staged != nil {
				return fmt.Errorf("it holds revision %d, %s, staged %v; the nodes have %d, %s", k.Revision(), k.CurrentID(), k.Info().Staged, want.Revision, want.KeyID)
			}
			return nil
		})
	}
}

// raw returns the shared keyring in the cluster store.
func raw(t *testing.T, m *machine) (raw []byte) {
	t.Helper()
	s := store(t, m)
	node.Eventually(t, 2*time.Minute, "the cluster store answers", func() (err error) {
		raw, err = s.Load(t.Context())
		return err
	})
	return raw
}

// swap replaces the shared keyring in the cluster store. The API may need more than the 10 s
// of a call; such a call may have replaced it, and is made again if not.
func swap(t *testing.T, s *kube.Store, old, next []byte) {
	t.Helper()
	node.Eventually(t, 2*time.Minute, "the shared keyring is replaced", func() error {
		err := s.Swap(t.Context(), old, next)
		if !errors.Is(err, clusterstore.ErrConflict) {
			return err
		}
		if now, unread := s.Load(t.Context()); unread != nil || !bytes.Equal(now, next) {
			t.Fatal(errors.Join(err, unread))
		}
		return nil
	})
}
