package tpmtest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/beezy-dev/kleidi/tpm/device"
)

// Exchange is one command and its response as they crossed the bus, including headers.
// Response is what the client received, or nil if it received nothing.
type Exchange struct {
	Code     tpm2.TPMCC
	Command  []byte
	Response []byte
}

// Fault says which commands fail, and how.
type Fault struct {
	// On is the command that fails; 0 means any.
	On tpm2.TPMCC
	// After is the number of such commands that succeed first.
	After int
	// Times is the number of commands that fail then; 0 means all, until the next
	// Inject.
	Times int
	// Do happens instead of the command.
	Do Action
}

// Action is a faulty TPM's reaction to a command. send lets the real TPM execute the
// command. The answer goes to the client, even if it is not a proper response; a nil
// answer closes the connection.
type Action func(command []byte, send func() []byte) (answer []byte)

// hang is an answer that never comes.
var hang = []byte("hang")

// Hang executes nothing and never answers.
func Hang(_ []byte, _ func() []byte) []byte { return hang }

// HangAfter executes the command and never answers.
func HangAfter(_ []byte, send func() []byte) []byte {
	send()
	return hang
}

// Drop executes nothing and closes the connection.
func Drop(_ []byte, _ func() []byte) []byte { return nil }

// Code executes nothing and answers with a response code.
func Code(rc tpm2.TPMRC) Action {
	return func([]byte, func() []byte) []byte {
		b := binary.BigEndian.AppendUint16(nil, uint16(tpm2.TPMSTNoSessions))
		b = binary.BigEndian.AppendUint32(b, 10)
		return binary.BigEndian.AppendUint32(b, uint32(rc))
	}
}

// Raw executes nothing and answers b.
func Raw(b []byte) Action { return func([]byte, func() []byte) []byte { return b } }

// Truncate sends the first n bytes of the real response, then closes.
func Truncate(n int) Action {
	return func(_ []byte, send func() []byte) []byte {
		response := send()
		return response[:min(n, len(response))]
	}
}

// Change sends the real response as changed by edit. It sets the length in the header
// again, so that only the rest of the response is wrong.
func Change(edit func(response []byte) []byte) Action {
	return func(_ []byte, send func() []byte) []byte {
		response := send()
		if response == nil {
			return nil
		}
		if response = edit(response); len(response) >= headerSize {
			binary.BigEndian.PutUint32(response[2:], uint32(len(response)))
		}
		return response
	}
}

const headerSize = 10

// Proxy is a proxy between a client and a TPM.
type Proxy struct {
	t        testing.TB
	upstream string
	path     string
	gone     chan struct{} // closed when the test ends
	serving  sync.WaitGroup

	mu       sync.Mutex
	listener net.Listener
	conns    map[net.Conn]bool
	fault    *Fault
	seen     int // commands that matched fault
	traffic  []Exchange
}

// NewProxy puts a proxy in front of the machine's TPM. The proxy stays across boots.
func NewProxy(t testing.TB, m *Machine) *Proxy {
	t.Helper()
	path, ok := strings.CutPrefix(m.Device(), "unix:")
	if !ok {
		t.Fatalf("%s is no unix socket", m.Device())
	}
	p := &Proxy{t: t, upstream: path, path: filepath.Join(tempDir(t), "proxy.sock"),
		gone: make(chan struct{}), conns: map[net.Conn]bool{}}
	p.Return()
	t.Cleanup(func() {
		close(p.gone)
		p.Vanish()
		p.serving.Wait()
	})
	return p
}

// Address returns the proxy's address, as device.ParseAddress reads it.
func (p *Proxy) Address() string { return "unix:" + p.path }

// TPM returns the TPM as seen through the proxy; see [Device].
func (p *Proxy) TPM(timeout time.Duration) *device.Device {
	p.t.Helper()
	return Device(p.t, p.Address(), timeout)
}

// Inject makes commands fail as f says, instead of the fault of an earlier Inject.
func (p *Proxy) Inject(f Fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fault, p.seen = &f, 0
}

// Heal lets all commands succeed again.
func (p *Proxy) Heal() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fault = nil
}

// Vanish closes all connections and removes the socket.
func (p *Proxy) Vanish() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.listener != nil {
		p.listener.Close()
		p.listener = nil
	}
	for c := range p.conns {
		c.Close()
	}
}

// Return undoes Vanish.
func (p *Proxy) Return() {
	p.t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.listener != nil {
		return
	}
	l, err := net.Listen("unix", p.path)
	if err != nil {
		p.t.Fatal(err)
	}
	p.listener = l
	p.serving.Go(func() { p.accept(l) })
}

// Traffic returns everything that has crossed the bus since the start of the proxy or
// the last Forget.
func (p *Proxy) Traffic() []Exchange {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]Exchange(nil), p.traffic...)
}

// Forget empties the record.
func (p *Proxy) Forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.traffic = nil
}

// Saw reports whether b crossed the bus unencrypted.
func (p *Proxy) Saw(b []byte) bool {
	for _, e := range p.Traffic() {
		if bytes.Contains(e.Command, b) || bytes.Contains(e.Response, b) {
			return true
		}
	}
	return false
}

// Count returns how often a client sent the command.
func (p *Proxy) Count(code tpm2.TPMCC) (n int) {
	for _, e := range p.Traffic() {
		if e.Code == code {
			n++
		}
	}
	return n
}

func (p *Proxy) accept(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		if p.adopt(l, c) {
			p.serving.Go(func() { p.serve(c) })
		}
	}
}

// adopt records a client's connection, unless its listener is already gone.
func (p *Proxy) adopt(l net.Listener, c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.listener != l {
		c.Close()
		return false
	}
	p.conns[c] = true
	return true
}

func (p *Proxy) serve(client net.Conn) {
	defer func() {
		client.Close()
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(p.conns, client)
	}()
	s := &server{path: p.upstream}
	defer s.close()
	for {
		command, err := readMessage(client)
		if err != nil {
			return
		}
		if !p.exchange(client, s, command) {
			return
		}
	}
}

// server is the real TPM. It connects at the first command, because swtpm refuses a
// second connection that waits while swtpm serves another.
type server struct {
	path string
	conn net.Conn
}

func (s *server) close() {
	if s.conn != nil {
		s.conn.Close()
	}
}

// send returns the response to a command, or nil if there is none.
func (s *server) send(command []byte) []byte {
	if s.conn == nil {
		c, err := net.Dial("unix", s.path)
		if err != nil {
			return nil
		}
		s.conn = c
	}
	if _, err := s.conn.Write(command); err != nil {
		return nil
	}
	response, err := readMessage(s.conn)
	if err != nil {
		return nil
	}
	return response
}

// exchange answers one command and reports whether the connection stays open.
func (p *Proxy) exchange(client net.Conn, s *server, command []byte) bool {
	code := tpm2.TPMCC(binary.BigEndian.Uint32(command[6:]))
	send := func() []byte { return s.send(command) }
	var answer []byte
	if action := p.next(code); action == nil {
		answer = send()
	} else {
		answer = action(command, send)
	}
	hangs := len(answer) > 0 && &answer[0] == &hang[0]
	p.record(Exchange{Code: code, Command: command}, answer, hangs)
	if hangs {
		s.close() // the machine's TPM is free for others
		p.waitForClient(client)
		return false
	}
	if _, err := client.Write(answer); err != nil {
		return false
	}
	return whole(answer)
}

func (p *Proxy) record(e Exchange, answer []byte, hangs bool) {
	if !hangs {
		e.Response = bytes.Clone(answer)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.traffic = append(p.traffic, e)
}

// next returns the action for a command, or nil for the ordinary one.
func (p *Proxy) next(code tpm2.TPMCC) Action {
	p.mu.Lock()
	defer p.mu.Unlock()
	f := p.fault
	if f == nil || f.On != 0 && f.On != code {
		return nil
	}
	p.seen++
	if n := p.seen - f.After; n < 1 || f.Times != 0 && n > f.Times {
		return nil
	}
	return f.Do
}

// waitForClient returns when the client gives up or the test ends.
func (p *Proxy) waitForClient(client net.Conn) {
	left := make(chan struct{})
	go func() {
		defer close(left)
		_, _ = io.Copy(io.Discard, client)
	}()
	select {
	case <-left:
	case <-p.gone:
		client.Close()
		<-left
	}
}

// whole reports whether b has the length in its header.
func whole(b []byte) bool {
	return len(b) >= headerSize && int(binary.BigEndian.Uint32(b[2:])) == len(b)
}

// readMessage reads one command or response, of the length in its header.
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

// Nonsense is an answer that no TPM gives.
type Nonsense struct {
	Answer []byte
	// Framed says that the header is that of a success and states the true length, so
	// that only a reader of the body can notice.
	Framed bool
}

// Garbage returns such answers by name.
func Garbage() map[string]Nonsense {
	header := func(tag uint16, size, rc uint32, body ...byte) []byte {
		b := binary.BigEndian.AppendUint16(nil, tag)
		b = binary.BigEndian.AppendUint32(b, size)
		b = binary.BigEndian.AppendUint32(b, rc)
		return append(b, body...)
	}
	const plain, sessions = uint16(tpm2.TPMSTNoSessions), uint16(tpm2.TPMSTSessions)
	ones := bytes.Repeat([]byte{0xff}, 20)
	return map[string]Nonsense{
		"text":             {[]byte("HTTP/1.1 400 Bad Request\r\n\r\n"), false},
		"zeroes":           {make([]byte, 64), false},
		"ones":             {bytes.Repeat([]byte{0xff}, 64), false},
		"length 0":         {header(plain, 0, 0), false},
		"length 4 GiB":     {header(plain, 0xffffffff, 0), false},
		"more than stated": {header(plain, 10, 0, 1, 2, 3, 4), false},
		"success, no body": {header(plain, 10, 0), true},
		"body of ones":     {header(plain, 30, 0, ones...), true},
		"sessions, ones":   {header(sessions, 30, 0, ones...), true},
		"sessions, zeroes": {header(sessions, 30, 0, make([]byte, 20)...), true},
	}
}
