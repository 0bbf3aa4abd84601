package client

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/beezy-dev/kleidi/seal"
)

// Limits of requests and answers.
const (
	// MaxAnswer is the maximum size of the body of an answer in bytes. The answer to
	// decrypt has about 500.
	MaxAnswer = 64 << 10
	// maxRequest is the size of a request in bytes up to which no buffer grows. A
	// buffer that grows leaves a copy behind.
	maxRequest = 32 << 10
	readBuffer = 4 << 10
	// maxHeaders is the maximum size of the header lines of an answer in bytes.
	maxHeaders = 32 << 10
)

var (
	ErrOversized = errors.New("the answer is too large")
	ErrHeaders   = errors.New("the answer's headers are too large")
)

// NotVault is an answer that is not JSON: from a proxy or another service.
type NotVault struct {
	Status      int
	contentType string
}

func (e *NotVault) Error() string {
	return fmt.Sprintf("the answer (status %d) is %.60q and not application/json", e.Status, e.contentType)
}

// wire is the http.RoundTripper of one operation: HTTP/1.1 over one TLS connection, which
// ends with the operation. net/http's Transport is not used, because it keeps requests and
// answers, and so the KEK, in buffers that can't be cleared. One goroutine uses a wire.
type wire struct {
	tls  *tls.Config
	host string // conn's server
	raw  *wipedConn
	conn *tls.Conn
	in   *bufio.Reader
	body []byte // of the last answer
	// stale says that conn can't serve another request.
	stale bool
}

// RoundTrip implements http.RoundTripper. It reads the whole body of the answer, which is
// valid until the next request.
func (w *wire) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.Body != nil {
		defer req.Body.Close()
	}
	ctx := req.Context()
	if err := w.dial(ctx, req.URL); err != nil {
		return nil, err
	}
	conn := w.raw.Conn
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	res, err := w.exchange(req)
	w.stale = !stop() // ctx has ended, so the deadline in the past is or will be set
	if err != nil {
		w.close()
	} else if res.Close {
		w.stale = true
	}
	if err != nil && ctx.Err() != nil {
		return nil, ctx.Err() // not the error of the deadline
	}
	return res, err
}

func (w *wire) dial(ctx context.Context, u *url.URL) error {
	if w.conn != nil && w.host == u.Host && !w.stale {
		return nil
	}
	w.close()
	port := u.Port()
	if port == "" {
		port = "443"
	}
	var dialer net.Dialer
	raw, err := dialer.DialContext(ctx, "tcp", net.JoinHostPort(u.Hostname(), port))
	if err != nil {
		return err
	}
	config := w.tls.Clone()
	if config.ServerName == "" {
		config.ServerName = u.Hostname()
	}
	w.raw = &wipedConn{Conn: raw, budget: unlimited}
	w.conn = tls.Client(w.raw, config)
	w.host = u.Host
	if err := w.conn.HandshakeContext(ctx); err != nil {
		w.close()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return &HandshakeError{err}
	}
	w.in = bufio.NewReaderSize(w.conn, readBuffer)
	return nil
}

// HandshakeError is the error of a failed handshake. An error after the handshake is
// none.
type HandshakeError struct{ Err error }

func (e *HandshakeError) Error() string { return e.Err.Error() }
func (e *HandshakeError) Unwrap() error { return e.Err }

func (w *wire) exchange(req *http.Request) (*http.Response, error) {
	var out bytes.Buffer
	out.Grow(maxRequest)
	defer func() { clear(out.Bytes()[:out.Cap()]) }()
	if err := req.Write(&out); err != nil {
		return nil, err
	}
	var err error
	// crypto/tls builds records in buffers that grow, and so leave copies behind
	seal.Erase(func() { _, err = w.conn.Write(out.Bytes()) })
	if err != nil {
		return nil, err
	}
	res, err := w.readHeaders(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	if err := w.readBody(res.Body); err != nil {
		return nil, err
	}
	if err := checkType(res); err != nil {
		return nil, err
	}
	res.Body = io.NopCloser(bytes.NewReader(w.body))
	return res, nil
}

// readHeaders reads the status and the headers of an answer. Unlike http.ReadResponse it
// limits their size.
func (w *wire) readHeaders(req *http.Request) (*http.Response, error) {
	w.raw.budget = maxHeaders + readBuffer
	defer func() { w.raw.budget = unlimited }()
	for {
		res, err := http.ReadResponse(w.in, req)
		if err != nil {
			return nil, err
		}
		if res.StatusCode >= http.StatusOK {
			return res, nil
		}
	}
}

// readBody reads the body into w.body. io.ReadAll would leave copies behind in the buffers
// that it outgrows.
func (w *wire) readBody(r io.Reader) error {
	clear(w.body)
	w.body = make([]byte, MaxAnswer+1)
	for n := 0; n < len(w.body); {
		m, err := r.Read(w.body[n:])
		n += m
		if errors.Is(err, io.EOF) && n <= MaxAnswer {
			w.body = w.body[:n]
			return nil
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
	}
	return fmt.Errorf("%w: more than %d bytes", ErrOversized, MaxAnswer)
}

// checkType checks that an answer with a body is JSON.
func checkType(res *http.Response) error {
	if res.StatusCode == http.StatusNoContent || res.StatusCode/100 == 3 {
		return nil
	}
	header := res.Header.Get("Content-Type")
	if mediaType, _, err := mime.ParseMediaType(header); err != nil || mediaType != "application/json" {
		return &NotVault{res.StatusCode, header}
	}
	return nil
}

// close closes the connection and clears its buffers.
func (w *wire) close() {
	if w.conn == nil {
		return
	}
	// The deadline keeps close_notify from waiting for a server that reads no more
	_ = w.raw.SetDeadline(time.Unix(1, 0))
	_ = w.conn.Close()
	_ = w.raw.Close()
	if w.in != nil {
		w.in.Reset(zeros{})
		_, _ = w.in.Peek(readBuffer) // fills the whole buffer
	}
	clear(w.body)
	w.raw.wipe()
	w.conn, w.raw, w.in, w.body, w.stale = nil, nil, nil, nil, false
}

// zeros is an endless reader of zeros.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// unlimited is a budget that no operation uses up.
const unlimited = 1 << 40

// wipedConn is a connection that keeps the buffers into which it read, although an
// io.Reader should not, and clears them at the end. crypto/tls decrypts in these buffers and
// does not clear them, so they hold the received plaintext.
//
// A Read ends at the end of a TLS record's header or payload. crypto/tls makes its buffer
// large enough before it reads a payload, so no payload moves to another buffer.
type wipedConn struct {
	net.Conn
	buffers [][]byte
	budget  int // bytes that may still be read
	header  []byte
	payload int // bytes of the current record that are still to be read
}

// recordHeader is the size of the header of a TLS record in bytes. The last two bytes of the
// header are the size of the payload.
const recordHeader = 5

// Read implements net.Conn.
func (c *wipedConn) Read(p []byte) (int, error) {
	want := c.payload
	if want == 0 {
		want = recordHeader - len(c.header)
	}
	n, err := c.Conn.Read(p[:min(len(p), want)])
	c.buffers = append(c.buffers, p[:n])
	if c.budget -= n; c.budget < 0 {
		return 0, ErrHeaders
	}
	if c.payload > 0 {
		c.payload -= n
		return n, err
	}
	if c.header = append(c.header, p[:n]...); len(c.header) == recordHeader {
		c.payload = int(c.header[3])<<8 | int(c.header[4])
		c.header = c.header[:0]
	}
	return n, err
}

func (c *wipedConn) wipe() {
	for _, b := range c.buffers {
		clear(b)
	}
	c.buffers = nil
}
