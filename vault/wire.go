package vault

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

// Limits of what is read.
const (
	// maxAnswer bounds the body of an answer, in bytes. That of a decrypt has about 500.
	maxAnswer = 64 << 10
	// maxRequest is the size of a request that never makes a buffer grow, which
	// would leave a copy behind.
	maxRequest = 32 << 10
	readBuffer = 4 << 10
	// maxHeaders bounds the header lines of an answer, in bytes.
	maxHeaders = 32 << 10
)

var (
	errOversized = errors.New("the answer is too large")
	errHeaders   = errors.New("the answer's headers are too large")
)

// notVault is an answer that is no JSON: a proxy's or another service's.
type notVault struct {
	status      int
	contentType string
}

func (e *notVault) Error() string {
	return fmt.Sprintf("the answer (status %d) is %.60q and not application/json", e.status, e.contentType)
}

// wire is the http.RoundTripper of one operation: HTTP/1.1 over one TLS connection
// that is closed with it. net/http's own Transport would do, but for the buffers:
// it keeps requests and answers, and so the KEK, in memory that nobody can clear.
// It is used by one goroutine.
type wire struct {
	tls  *tls.Config
	host string // that conn leads to
	raw  *wiped
	conn *tls.Conn
	in   *bufio.Reader
	body []byte // of the last answer
	// stale says that conn can't be used for another request.
	stale bool
}

// RoundTrip implements http.RoundTripper. The answer's body is read whole, and is
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
	w.stale = !stop() // the deadline in the past is there, or comes
	if err != nil {
		w.close()
	} else if res.Close {
		w.stale = true
	}
	if err != nil && ctx.Err() != nil {
		return nil, ctx.Err() // rather than the deadline that it caused
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
	w.raw = &wiped{Conn: raw, left: unlimited}
	w.conn = tls.Client(w.raw, config)
	w.host = u.Host
	if err := w.conn.HandshakeContext(ctx); err != nil {
		w.close()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return &handshakeError{err}
	}
	w.in = bufio.NewReaderSize(w.conn, readBuffer)
	return nil
}

// handshakeError tells a failed handshake from a connection that broke later.
type handshakeError struct{ err error }

func (e *handshakeError) Error() string { return e.err.Error() }
func (e *handshakeError) Unwrap() error { return e.err }

func (w *wire) exchange(req *http.Request) (*http.Response, error) {
	var out bytes.Buffer
	out.Grow(maxRequest)
	defer func() { clear(out.Bytes()[:out.Cap()]) }()
	if err := req.Write(&out); err != nil {
		return nil, err
	}
	var err error
	// crypto/tls builds records in buffers that may grow, and leave a copy, on the way
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

// readHeaders bounds what an answer's head may hold, which http.ReadResponse doesn't.
func (w *wire) readHeaders(req *http.Request) (*http.Response, error) {
	w.raw.left = maxHeaders + readBuffer
	defer func() { w.raw.left = unlimited }()
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

// readBody reads into a buffer of this package's own; io.ReadAll would leave a copy
// at each growth.
func (w *wire) readBody(r io.Reader) error {
	clear(w.body)
	w.body = make([]byte, maxAnswer+1)
	for n := 0; n < len(w.body); {
		m, err := r.Read(w.body[n:])
		n += m
		if errors.Is(err, io.EOF) && n <= maxAnswer {
			w.body = w.body[:n]
			return nil
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
	}
	return fmt.Errorf("%w: more than %d bytes", errOversized, maxAnswer)
}

// checkType wants JSON, as Vault answers, but where there is nothing to read.
func checkType(res *http.Response) error {
	if res.StatusCode == http.StatusNoContent || res.StatusCode/100 == 3 {
		return nil
	}
	header := res.Header.Get("Content-Type")
	if mediaType, _, err := mime.ParseMediaType(header); err != nil || mediaType != "application/json" {
		return &notVault{res.StatusCode, header}
	}
	return nil
}

// close ends the connection and clears what it held.
func (w *wire) close() {
	if w.conn == nil {
		return
	}
	// A server that reads no more must not hold up a close_notify.
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

// zeros reads as zeros without end.
type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

// unlimited is a limit that no operation reaches.
const unlimited = 1 << 40

// wiped is a connection that remembers into which buffers it read, although a
// Reader should not. crypto/tls decrypts in place and never clears, so that what
// it received in clear lies there. They are cleared when tls.Conn is done with them.
//
// A Read ends where a TLS record's header or payload does. crypto/tls makes its
// buffer large enough before it asks for a payload, so that none moves to another.
type wiped struct {
	net.Conn
	buffers [][]byte
	left    int // bytes that may still be read
	header  []byte
	payload int // bytes of the record that are to come
}

// recordHeader is the size of a TLS record's header, whose last two bytes are the
// size of the payload.
const recordHeader = 5

// Read implements net.Conn.
func (c *wiped) Read(p []byte) (int, error) {
	want := c.payload
	if want == 0 {
		want = recordHeader - len(c.header)
	}
	n, err := c.Conn.Read(p[:min(len(p), want)])
	c.buffers = append(c.buffers, p[:n])
	if c.left -= n; c.left < 0 {
		return 0, errHeaders
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

func (c *wiped) wipe() {
	for _, b := range c.buffers {
		clear(b)
	}
	c.buffers = nil
}
