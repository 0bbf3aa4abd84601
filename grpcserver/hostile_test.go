package grpcserver_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	kmsapi "k8s.io/kms/apis/v2"

	"github.com/beezy-dev/kleidi/grpcserver"
)

// patience bounds every wait in this file; it only matters when a test fails.
const patience = 3 * time.Minute

func (r *running) raw(t testing.TB) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", r.path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return c
}

// wantServing fails unless an honest client is answered.
func (r *running) wantServing(t testing.TB) {
	t.Helper()
	if _, err := kmsapi.NewKeyManagementServiceClient(r.conn(t)).Status(limited(t), &kmsapi.StatusRequest{}, grpc.WaitForReady(true)); err != nil {
		t.Fatalf("the server does not answer any more: %v", err)
	}
}

// wantClosed reads until the server hangs up.
func wantClosed(t testing.TB, c net.Conn) {
	t.Helper()
	if _, err := io.Copy(io.Discard, c); err != nil && !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the server does not hang up: %v", err)
	}
}

func TestGarbage(t *testing.T) {
	r := start(t, newKeys(t, "k1-a"), grpcserver.ListenConfig{})
	for name, input := range map[string]string{
		"zeros":             strings.Repeat("\x00", 1<<16),
		"ones":              strings.Repeat("\xff", 1<<16),
		"HTTP/1.1":          "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
		"TLS":               "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
		"oversized frame":   http2.ClientPreface + "\xff\xff\xff\x00\x00\x00\x00\x00\x01" + strings.Repeat("x", 1<<16),
		"no settings first": http2.ClientPreface + "\x00\x00\x04\x03\x00\x00\x00\x00\x01\x00\x00\x00\x00",
		"bad header block":  http2.ClientPreface + "\x00\x00\x00\x04\x00\x00\x00\x00\x00" + "\x00\x00\x05\x01\x05\x00\x00\x00\x01\xff\xff\xff\xff\xff",
		"data on stream 0":  http2.ClientPreface + "\x00\x00\x00\x04\x00\x00\x00\x00\x00" + "\x00\x00\x01\x00\x00\x00\x00\x00\x00x",
	} {
		t.Run(name, func(t *testing.T) {
			c := r.raw(t)
			_, _ = c.Write([]byte(input)) // the server may hang up meanwhile
			_ = c.(*net.UnixConn).CloseWrite()
			wantClosed(t, c)
			r.wantServing(t)
		})
	}
}

// TestSilentConnections: a client that connects and sends nothing is disconnected.
func TestSilentConnections(t *testing.T) {
	t.Parallel()
	r := start(t, newKeys(t, "k1-a"), grpcserver.ListenConfig{})
	half := r.raw(t)
	if _, err := half.Write([]byte(http2.ClientPreface[:10])); err != nil {
		t.Fatal(err)
	}
	silent := r.raw(t)
	r.wantServing(t)
	wantClosed(t, silent)
	wantClosed(t, half)
	r.wantServing(t)
}

// h2 speaks HTTP/2 by hand.
type h2 struct {
	*http2.Framer
	t testing.TB
}

func (r *running) h2(t testing.TB) *h2 {
	t.Helper()
	c := r.raw(t)
	if _, err := c.Write([]byte(http2.ClientPreface)); err != nil {
		t.Fatal(err)
	}
	f := &h2{http2.NewFramer(c, c), t}
	f.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	f.must(f.WriteSettings())
	f.must(f.WriteSettingsAck())
	return f
}

func (f *h2) must(err error) {
	f.t.Helper()
	if err != nil {
		f.t.Fatal(err)
	}
}

// call opens an Encrypt on a stream and sends no body.
func (f *h2) call(stream uint32, fields ...hpack.HeaderField) {
	f.t.Helper()
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	for _, h := range append([]hpack.HeaderField{
		{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":authority", Value: "localhost"},
		{Name: ":path", Value: kmsapi.KeyManagementService_Encrypt_FullMethodName},
		{Name: "content-type", Value: "application/grpc"}, {Name: "te", Value: "trailers"},
	}, fields...) {
		f.must(e.WriteField(h))
	}
	f.must(f.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: b.Bytes(), EndHeaders: true}))
}

// next returns the next frame that is not about the connection's housekeeping.
func (f *h2) next() http2.Frame {
	f.t.Helper()
	for {
		fr, err := f.ReadFrame()
		f.must(err)
		switch fr := fr.(type) {
		case *http2.SettingsFrame, *http2.WindowUpdateFrame, *http2.PingFrame:
			continue
		case *http2.RSTStreamFrame:
			if fr.ErrCode == http2.ErrCodeNo {
				continue // follows an answer to a request that is not complete
			}
		}
		return fr
	}
}

func grpcStatus(t testing.TB, fr http2.Frame) string {
	t.Helper()
	h, ok := fr.(*http2.MetaHeadersFrame)
	if !ok {
		t.Fatalf("got %v, want headers", fr)
	}
	for _, f := range h.Fields {
		if f.Name == "grpc-status" {
			return f.Value
		}
	}
	t.Fatalf("no grpc-status in %v", h.Fields)
	return ""
}

// TestBodyThatNeverComes: a call without a deadline, or with a distant one, still ends.
func TestBodyThatNeverComes(t *testing.T) {
	t.Parallel()
	r := start(t, newKeys(t, "k1-a"), grpcserver.ListenConfig{})
	f := r.h2(t)
	begin := time.Now()
	f.call(1)
	f.call(3, hpack.HeaderField{Name: "grpc-timeout", Value: "90H"})
	f.must(f.WriteData(3, false, []byte{0, 0, 0, 0, 9, 1})) // 1 byte of 9
	for range 2 {
		if s := grpcStatus(t, f.next()); s != "4" {
			t.Errorf("grpc-status %s, want 4, deadline exceeded", s)
		}
	}
	if d := time.Since(begin); d < 9*time.Second || d > patience {
		t.Errorf("ended after %v", d)
	}
	r.wantServing(t)
}

func TestOversizedLengthPrefix(t *testing.T) {
	r := start(t, newKeys(t, "k1-a"), grpcserver.ListenConfig{})
	f := r.h2(t)
	f.call(1)
	f.must(f.WriteData(1, false, []byte{0, 0xff, 0xff, 0xff, 0xff}))
	if s := grpcStatus(t, f.next()); s != "8" {
		t.Errorf("grpc-status %s, want 8, resource exhausted", s)
	}
	r.wantServing(t)
}

func TestTooManyStreams(t *testing.T) {
	r := start(t, newKeys(t, "k1-a"), grpcserver.ListenConfig{})
	f := r.h2(t)
	for i := range uint32(257) {
		f.call(2*i + 1)
	}
	rst, ok := f.next().(*http2.RSTStreamFrame)
	if !ok || rst.ErrCode != http2.ErrCodeRefusedStream || rst.StreamID != 2*256+1 {
		t.Errorf("got %v, want stream 513 refused", rst)
	}
	r.wantServing(t)
}

func TestPingFlood(t *testing.T) {
	r := start(t, newKeys(t, "k1-a"), grpcserver.ListenConfig{})
	f := r.h2(t)
	for range 8 {
		if f.WritePing(false, [8]byte{}) != nil {
			break // already disconnected
		}
	}
	away, ok := f.next().(*http2.GoAwayFrame)
	if !ok || away.ErrCode != http2.ErrCodeEnhanceYourCalm {
		t.Errorf("got %v, want GOAWAY", away)
	}
	r.wantServing(t)
}

// TestTooManyConnections: above the limit, new connections are closed, and the end of
// an old one makes room.
func TestTooManyConnections(t *testing.T) {
	r := start(t, newKeys(t, "k1-a"), grpcserver.ListenConfig{})
	raws := make([]net.Conn, 256)
	for i := range raws {
		raws[i] = r.raw(t)
		_, err := raws[i].Write([]byte(http2.ClientPreface + "\x00\x00\x00\x04\x00\x00\x00\x00\x00"))
		if err != nil {
			t.Fatal(err)
		}
	}
	wantClosed(t, r.raw(t))
	if !strings.Contains(r.log.String(), "too many connections") {
		t.Error("nothing is logged")
	}
	raws[0].Close()
	r.wantServing(t) // gRPC connects again until there is room
}

// TestStrangersDontCrowdOut: refused peers have only a few separate seats.
func TestStrangersDontCrowdOut(t *testing.T) {
	r := start(t, newKeys(t, "k1-a"), grpcserver.ListenConfig{Mode: 0o666, AllowedUIDs: []uint32{1000}})
	for range 16 {
		r.h2(t).call(1)
	}
	wantClosed(t, r.raw(t))
	out, err := reexec(t, 1000, asClient+"="+r.path).Output()
	if err != nil || !strings.HasPrefix(string(out), "OK: ") {
		t.Errorf("the allowed peer gets %s (%v)", out, err)
	}
}

func TestGracefulStop(t *testing.T) {
	for _, patient := range []bool{true, false} {
		keys := newKeys(t, "k1-a")
		keys.wait, keys.entered = make(chan struct{}), make(chan struct{}, 1)
		r := start(t, keys, grpcserver.ListenConfig{})
		c := r.client(t)
		result := make(chan error, 1)
		go func() {
			_, err := c.Encrypt(context.Background(), &kmsapi.EncryptRequest{Plaintext: []byte("seed")})
			result <- err
		}()
		<-keys.entered
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		stopped := make(chan struct{})
		go func() { r.srv.GracefulStop(ctx); close(stopped) }()
		for { // until no new connection is accepted
			conn, err := net.Dial("unix", r.path)
			if err != nil {
				break
			}
			conn.Close()
		}
		want := codes.OK
		if patient {
			close(keys.wait)
		} else {
			want = codes.Unavailable
			cancel()
		}
		if err := <-result; status.Code(err) != want {
			t.Errorf("patient %v: %v", patient, err)
		}
		if !patient {
			close(keys.wait)
		}
		<-stopped
		if _, err := os.Lstat(r.path); err == nil {
			t.Error("the socket is still there")
		}
	}
}

func FuzzRawBytes(f *testing.F) {
	r := start(f, newKeys(f, "k1-a"), grpcserver.ListenConfig{})
	settings := "\x00\x00\x00\x04\x00\x00\x00\x00\x00"
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Add([]byte(http2.ClientPreface + settings))
	f.Add([]byte(http2.ClientPreface + settings + "\x00\x00\x05\x01\x05\x00\x00\x00\x01\x83\x86\x84\x41\x00"))
	f.Add([]byte(http2.ClientPreface + settings + "\x00\x00\x08\x06\x00\x00\x00\x00\x0012345678"))
	f.Fuzz(func(t *testing.T, input []byte) {
		c := r.raw(t)
		_, _ = c.Write(input)
		_ = c.(*net.UnixConn).CloseWrite()
		wantClosed(t, c)
		r.wantServing(t)
	})
}
