package storetest

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"maps"
	"sync"

	"github.com/beezy-dev/kleidi/seal/store"
)

// ErrLost is the error of a call whose answer did not arrive.
var ErrLost = errors.New("the answer was lost")

// Memory is a cluster store in memory, with the faults of a real one. It is empty at
// first. Its methods may be called concurrently.
type Memory struct {
	mu       sync.Mutex
	now      content
	before   []byte // the keyring before the last swap
	clock    uint64
	watchers map[*func()]bool
	down     error
	lacking  error // of a record that is not there
	next     fault
	late     []func() // swaps that have not arrived yet
}

// content is the content of a snapshot.
type content struct {
	keyring []byte // nil: none
	at      uint64
	records map[string]stored
}

type stored struct {
	bytes []byte
	at    uint64
}

// fault is a fault of the next call of its kind.
type fault int

const (
	noFault fault = iota
	loseAnswer
	delaySwap
	staleLoad
)

// Load implements replica.Store.
func (m *Memory) Load(context.Context) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.down != nil {
		return nil, m.down
	}
	b := m.now.keyring
	if m.next == staleLoad {
		m.next, b = noFault, m.before
	}
	if b == nil {
		return nil, fs.ErrNotExist
	}
	return bytes.Clone(b), nil
}

// Swap implements replica.Store.
func (m *Memory) Swap(ctx context.Context, old, next []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	if len(next) > store.MaxSize {
		return errors.New("too large")
	}
	if m.down != nil {
		return m.down
	}
	old, next = bytes.Clone(old), bytes.Clone(next)
	switch m.next {
	case delaySwap:
		m.next = noFault
		m.late = append(m.late, func() { _ = m.swap(old, next) })
		return ErrLost
	case loseAnswer:
		m.next = noFault
		_ = m.swap(old, next)
		return ErrLost
	}
	return m.swap(old, next)
}

func (m *Memory) swap(old, next []byte) error {
	if (old == nil) != (m.now.keyring == nil) || !bytes.Equal(old, m.now.keyring) {
		return store.ErrConflict
	}
	m.put(next)
	return nil
}

func (m *Memory) put(keyring []byte) {
	m.clock++
	m.before, m.now.keyring, m.now.at = m.now.keyring, keyring, m.clock
	m.changed()
}

// Records implements replica.Store.
func (m *Memory) Records(_ context.Context, nodes ...string) ([]store.NodeRecord, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.down != nil {
		return nil, m.down
	}
	var all []store.NodeRecord
	for _, name := range nodes {
		if r, ok := m.now.records[name]; ok {
			all = append(all, store.NodeRecord{Node: name, Bytes: bytes.Clone(r.bytes), AfterKeyring: r.at > m.now.at})
		}
	}
	return all, nil
}

// PutRecord implements replica.Store.
func (m *Memory) PutRecord(_ context.Context, node string, record []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.down != nil {
		return m.down
	}
	if _, ok := m.now.records[node]; !ok && m.lacking != nil {
		return m.lacking
	}
	m.clock++
	records := maps.Clone(m.now.records)
	if records == nil {
		records = map[string]stored{}
	}
	records[node] = stored{bytes.Clone(record), m.clock}
	m.now.records = records
	m.changed()
	return nil
}

// RefuseRecords makes the store answer err when a node writes a record in the place of none;
// nil ends that. A node's role in the API gives no right to make one.
func (m *Memory) RefuseRecords(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.lacking = err
}

// DeleteRecord deletes the record of a node, as an intruder who can write the store does.
func (m *Memory) DeleteRecord(node string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.now.records = maps.Clone(m.now.records)
	delete(m.now.records, node)
	m.changed()
}

// Watch implements replica.Store.
func (m *Memory) Watch(ctx context.Context, changed func()) {
	m.mu.Lock()
	if m.watchers == nil {
		m.watchers = map[*func()]bool{}
	}
	m.watchers[&changed] = true
	m.mu.Unlock()
	changed() // as a watch that has just connected
	<-ctx.Done()
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.watchers, &changed)
}

func (m *Memory) changed() {
	for f := range m.watchers {
		(*f)()
	}
}

// SetDown makes every call fail with err; nil makes them succeed again.
func (m *Memory) SetDown(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.down = err
}

// Write puts a keyring into the store, as an intruder who can write the store does.
func (m *Memory) Write(keyring []byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.put(bytes.Clone(keyring))
}

// LoseAnswer implements [Harness].
func (m *Memory) LoseAnswer() { m.setNext(loseAnswer) }

// Delay implements [Harness].
func (m *Memory) Delay() (arrive func()) {
	m.setNext(delaySwap)
	return m.Arrive
}

// Stale implements [Harness].
func (m *Memory) Stale() { m.setNext(staleLoad) }

func (m *Memory) setNext(f fault) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.next = f
}

// Arrive makes every delayed swap arrive.
func (m *Memory) Arrive() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, swap := range m.late {
		swap()
	}
	m.late = nil
}

// Snapshot implements [Harness]. Like etcd's, a restored store continues with the
// clock of the snapshot, and tells no watcher.
func (m *Memory) Snapshot() (restore func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	then, clock := m.now, m.clock
	return func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.now, m.before, m.clock = then, then.keyring, clock
	}
}
