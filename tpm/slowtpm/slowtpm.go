// Package slowtpm is a proxy between kleidi and a swtpm. It counts the commands by
// kind, and answers as slowly as another kind of TPM would. swtpm takes a millisecond
// for a command that takes a discrete TPM a quarter of a second, so only this package
// shows what a command costs.
package slowtpm

import (
	"encoding/binary"
	"errors"
	"io"
	"maps"
	"net"
	"sync"
	"time"
)

// Model says how long a kind of TPM takes for a command of each kind.
type Model struct {
	Name  string
	Takes map[Kind]time.Duration
}

const ms = time.Millisecond

// Three kinds of TPM. The figures of the discrete TPMs are from wolfTPM's README,
// rounded up: 64 to 250 ms for a multiplication and 42 to 69 ms for a signature. No
// real TPM should be slower than Slow.
var (
	Virtual = Model{Name: "virtual"} // as fast as the swtpm behind it
	Fast    = Model{Name: "discrete, fast", Takes: map[Kind]time.Duration{Curve: 64 * ms, RSA: 200 * ms, Write: 20 * ms, Other: 5 * ms}}
	Slow    = Model{Name: "discrete, slow", Takes: map[Kind]time.Duration{Curve: 250 * ms, RSA: 800 * ms, Write: 50 * ms, Other: 10 * ms}}
)

// TPM is a TPM of one of these kinds, as a unix socket.
type TPM struct {
	upstream string
	listener net.Listener
	serving  sync.WaitGroup

	mu     sync.Mutex
	model  Model
	counts map[Kind]int
	conns  map[net.Conn]bool
	done   chan struct{}
}

// Listen serves, at path, the TPM whose socket is at upstream.
func Listen(path, upstream string, m Model) (*TPM, error) {
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	t := &TPM{upstream: upstream, listener: l, model: m, counts: map[Kind]int{}, conns: map[net.Conn]bool{}, done: make(chan struct{})}
	t.serving.Go(t.accept)
	return t, nil
}

// Use changes the model.
func (t *TPM) Use(m Model) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.model = m
}

// Take returns the number of commands of each kind since the last Take.
func (t *TPM) Take() map[Kind]int {
	t.mu.Lock()
	defer t.mu.Unlock()
	counts := maps.Clone(t.counts)
	clear(t.counts)
	return counts
}

// Close ends the connections and the socket.
func (t *TPM) Close() {
	t.listener.Close()
	close(t.done)
	t.mu.Lock()
	for c := range t.conns {
		c.Close()
	}
	t.mu.Unlock()
	t.serving.Wait()
}

func (t *TPM) accept() {
	for {
		client, err := t.listener.Accept()
		if err != nil {
			return
		}
		t.serving.Go(func() { t.serve(client) })
	}
}

func (t *TPM) serve(client net.Conn) {
	defer client.Close()
	t.mu.Lock()
	t.conns[client] = true
	t.mu.Unlock()
	defer func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		delete(t.conns, client)
	}()
	server, err := net.Dial("unix", t.upstream)
	if err != nil {
		return
	}
	defer server.Close()
	for t.exchange(client, server) == nil {
	}
}

func (t *TPM) exchange(client, server net.Conn) error {
	command, err := readMessage(client)
	if err != nil {
		return err
	}
	answered := time.After(t.count(KindOf(command)))
	if _, err := server.Write(command); err != nil {
		return err
	}
	response, err := readMessage(server)
	if err != nil {
		return err
	}
	select {
	case <-answered:
	case <-t.done:
		return net.ErrClosed
	}
	_, err = client.Write(response)
	return err
}

// count counts a command and returns how long it takes.
func (t *TPM) count(k Kind) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.counts[k]++
	return t.model.Takes[k]
}

func readMessage(r io.Reader) ([]byte, error) {
	b := make([]byte, headerSize)
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint32(b[2:]))
	if n < headerSize || n > 1<<16 {
		return nil, errors.New("message out of form")
	}
	b = append(b, make([]byte, n-headerSize)...)
	_, err := io.ReadFull(r, b[headerSize:])
	return b, err
}
