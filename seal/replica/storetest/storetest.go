// Package storetest holds the conformance tests that every cluster store must pass, and
// an in-memory store with the faults of a real one.
package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/seal/replica"
	"github.com/beezy-dev/kleidi/seal/store"
)

// Harness is an empty store with faults that a test causes. Each fault affects only the
// next call of its kind.
type Harness interface {
	replica.Store
	// LoseAnswer makes the next swap happen, and loses its answer.
	LoseAnswer()
	// Delay makes the next swap fail for the caller, and reach the store when arrive is
	// called.
	Delay() (arrive func())
	// Stale makes the next Load return the content from before the last swap.
	Stale()
	// Snapshot returns a function that restores the present state of the store.
	Snapshot() (restore func())
}

// soon bounds a test's wait for something that must happen.
const soon = 30 * time.Second

// Test runs the conformance tests, each on an empty store of open.
func Test(t *testing.T, open func(*testing.T) Harness) {
	for _, test := range []struct {
		name string
		run  func(*testing.T, Harness)
	}{
		{"empty", testEmpty}, {"swap", testSwap}, {"one of many wins", testRace}, {"records", testRecords}, {"record after keyring", testAfterKeyring},
		{"watch", testWatch}, {"lost answer", testLostAnswer}, {"late answer", testLate}, {"late and overtaken", testLateOvertaken},
		{"stale read", testStale}, {"restore", testRestore}, {"large", testLarge}, {"cancelled", testCancelled},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, open(t)) })
	}
}

// keyringOf returns size bytes that stand for a keyring. They include every byte value.
func keyringOf(name string, size int) []byte {
	b := []byte(name)
	for i := len(b); i < size; i++ {
		b = append(b, byte(i))
	}
	return b
}

func swap(t *testing.T, s replica.Store, old, next []byte) {
	t.Helper()
	if err := s.Swap(t.Context(), old, next); err != nil {
		t.Fatalf("swap: %v", err)
	}
}

func holds(t *testing.T, s replica.Store, want []byte) {
	t.Helper()
	got, err := s.Load(t.Context())
	if want == nil {
		if !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("load: %d bytes, %v; want fs.ErrNotExist", len(got), err)
		}
		return
	}
	if err != nil || !bytes.Equal(got, want) {
		t.Errorf("the store holds %.20q, %v; want %.20q", got, err, want)
	}
}

func conflicts(t *testing.T, s replica.Store, old, next []byte) {
	t.Helper()
	if err := s.Swap(t.Context(), old, next); !errors.Is(err, store.ErrConflict) {
		t.Errorf("swap: %v, want a conflict", err)
	}
}

// unknown demands an error that leaves open whether the swap has happened.
func unknown(t *testing.T, err error) {
	t.Helper()
	if err == nil || errors.Is(err, store.ErrConflict) {
		t.Errorf("swap: %v, want an error that is no conflict", err)
	}
}

func testEmpty(t *testing.T, s Harness) {
	holds(t, s, nil)
	conflicts(t, s, []byte("a"), []byte("b"))
	holds(t, s, nil)
	if r, err := s.Records(t.Context(), "a"); err != nil || len(r) != 0 {
		t.Errorf("records: %v, %v", r, err)
	}
}

func testSwap(t *testing.T, s Harness) {
	a, b := keyringOf("a", 300), keyringOf("b", 300)
	swap(t, s, nil, a)
	conflicts(t, s, nil, b)
	conflicts(t, s, b, b)
	conflicts(t, s, a[:len(a)-1], b)
	holds(t, s, a)
	swap(t, s, a, b)
	conflicts(t, s, a, a)
	holds(t, s, b)
	swap(t, s, b, b)
}

func testRace(t *testing.T, s Harness) {
	a := []byte("a")
	swap(t, s, nil, a)
	var won sync.Map
	var group sync.WaitGroup
	for i := range 8 {
		group.Go(func() {
			next := fmt.Appendf(nil, "by %d", i)
			switch err := s.Swap(context.Background(), a, next); {
			case err == nil:
				won.Store(string(next), true)
			case !errors.Is(err, store.ErrConflict):
				t.Error(err)
			}
		})
	}
	group.Wait()
	n := 0
	won.Range(func(next, _ any) bool {
		n++
		holds(t, s, []byte(next.(string)))
		return true
	})
	if n != 1 {
		t.Errorf("%d swaps of one keyring succeeded", n)
	}
}

func records(t *testing.T, s replica.Store) map[string]store.NodeRecord {
	t.Helper()
	all, err := s.Records(t.Context(), "a", "b", "c")
	if err != nil {
		t.Fatal(err)
	}
	m := map[string]store.NodeRecord{}
	for _, r := range all {
		m[r.Node] = r
	}
	return m
}

func put(t *testing.T, s replica.Store, node, record string) {
	t.Helper()
	if err := s.PutRecord(t.Context(), node, []byte(record)); err != nil {
		t.Fatal(err)
	}
}

func testRecords(t *testing.T, s Harness) {
	put(t, s, "a", "one")
	put(t, s, "b", "two")
	put(t, s, "a", "three")
	put(t, s, "a", "three")
	if r := records(t, s); len(r) != 2 || string(r["a"].Bytes) != "three" || string(r["b"].Bytes) != "two" {
		t.Errorf("%+v", r)
	}
	holds(t, s, nil)
}

func testAfterKeyring(t *testing.T, s Harness) {
	put(t, s, "a", "one")
	swap(t, s, nil, []byte("k"))
	put(t, s, "b", "two")
	if r := records(t, s); r["a"].AfterKeyring || !r["b"].AfterKeyring {
		t.Errorf("%+v", r)
	}
	put(t, s, "a", "one") // the same bytes again
	swap(t, s, []byte("k"), []byte("l"))
	put(t, s, "a", "one")
	if r := records(t, s); !r["a"].AfterKeyring || r["b"].AfterKeyring {
		t.Errorf("%+v", r)
	}
}

func testWatch(t *testing.T, s Harness) {
	ctx, cancel := context.WithCancel(t.Context())
	ticks, ended := make(chan struct{}, 1), make(chan struct{})
	go func() {
		defer close(ended)
		s.Watch(ctx, func() {
			select {
			case ticks <- struct{}{}:
			default:
			}
		})
	}()
	old := []byte(nil)
	for i := range 3 { // the first may come before the watch has begun
		next := fmt.Appendf(nil, "%d", i)
		deadline := time.After(soon)
		for told := false; !told; {
			swap(t, s, old, next)
			old = next
			select {
			case <-ticks:
				told = true
			case <-deadline:
				t.Fatal("the watch does not tell of a swap")
			case <-time.After(100 * time.Millisecond):
				next = append(bytes.Clone(next), '+')
			}
		}
	}
	for deadline := time.After(soon); ; {
		select {
		case <-ticks:
			continue
		case <-time.After(200 * time.Millisecond):
		}
		put(t, s, "a", time.Now().String())
		select {
		case <-ticks:
		case <-deadline:
			t.Fatal("the watch does not tell of a record")
		case <-time.After(200 * time.Millisecond):
			continue
		}
		break
	}
	cancel()
	select {
	case <-ended:
	case <-time.After(soon):
		t.Error("the watch does not end")
	}
}

func testLostAnswer(t *testing.T, s Harness) {
	a, b := []byte("a"), []byte("b")
	swap(t, s, nil, a)
	s.LoseAnswer()
	if err := s.Swap(t.Context(), a, b); errors.Is(err, store.ErrConflict) {
		t.Errorf("a swap that happened: %v", err)
	}
	holds(t, s, b)
}

func testLate(t *testing.T, s Harness) {
	a, b := []byte("a"), []byte("b")
	swap(t, s, nil, a)
	arrive := s.Delay()
	unknown(t, s.Swap(t.Context(), a, b))
	holds(t, s, a)
	arrive()
	holds(t, s, b)
}

// testLateOvertaken: a swap that arrives late changes nothing if another one has
// overtaken it.
func testLateOvertaken(t *testing.T, s Harness) {
	a, b, c := []byte("a"), []byte("b"), []byte("c")
	swap(t, s, nil, a)
	arrive := s.Delay()
	unknown(t, s.Swap(t.Context(), a, b))
	swap(t, s, a, c)
	arrive()
	holds(t, s, c)
}

func testStale(t *testing.T, s Harness) {
	a, b, c := []byte("a"), []byte("b"), []byte("c")
	swap(t, s, nil, a)
	swap(t, s, a, b)
	s.Stale()
	holds(t, s, a)
	conflicts(t, s, a, c)
	holds(t, s, b)
}

// testRestore: a swap fails if it starts from the content before the restore, and
// succeeds if it starts from the restored content.
func testRestore(t *testing.T, s Harness) {
	a, b, c := []byte("a"), []byte("b"), []byte("c")
	swap(t, s, nil, a)
	put(t, s, "a", "one")
	restore := s.Snapshot()
	swap(t, s, a, b)
	put(t, s, "a", "two")
	put(t, s, "b", "two")
	restore()
	holds(t, s, a)
	if r := records(t, s); len(r) != 1 || string(r["a"].Bytes) != "one" {
		t.Errorf("%+v", r)
	}
	conflicts(t, s, b, c)
	swap(t, s, a, c)
	holds(t, s, c)
}

func testLarge(t *testing.T, s Harness) {
	a, b := keyringOf("a", 400<<10), keyringOf("b", 400<<10)
	swap(t, s, nil, a)
	swap(t, s, a, b)
	holds(t, s, b)
	if err := s.Swap(t.Context(), b, make([]byte, store.MaxSize+1)); err == nil {
		t.Error("a keyring over the limit is stored")
	}
	holds(t, s, b)
}

func testCancelled(t *testing.T, s Harness) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Swap(ctx, nil, []byte("a")); err == nil {
		t.Error("a cancelled swap succeeds")
	}
	holds(t, s, nil)
}
