package client

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cenkalti/backoff/v5"
)

func TestLines(t *testing.T) {
	for text, want := range map[string][]string{
		"permission denied":                              {"permission denied"},
		"an error of the storage":                        {"an error of the storage"},
		"1 error occurred:\n\t* sealed\n\n":              {"sealed"},
		"2 errors occurred:\n\t* sealed\n\t* denied\n\n": {"sealed", "denied"},
		"a change occurred:\n* sealed":                   {"a change occurred:", "sealed"},
		" \n\n":                                          nil,
	} {
		if got := (&Refusal{Texts: []string{text}}).Lines(); !slices.Equal(got, want) {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
	s := &Client{}
	if got := s.Quote(&Refusal{Status: 400, Texts: []string{strings.Repeat("x", MaxQuoted+1)}}); strings.Count(got, "x") != MaxQuoted || !strings.Contains(got, "…") {
		t.Error(got)
	}
	if got := s.Quote(&Refusal{Status: 400, Texts: []string{strings.Repeat("x", MaxQuoted)}}); strings.Contains(got, "…") {
		t.Error(got)
	}
	s.secrets = [][]byte{nil, []byte(`s"e\t`)}
	for _, text := range []string{`bad s"e\t`, `bad s\"e\\t`, `bad 7322655c74`, `bad cyJlXHQ`} {
		if got := s.Quote(&Refusal{Status: 400, Texts: []string{text}}); !strings.Contains(got, "withheld") {
			t.Errorf("%q is quoted: %s", text, got)
		}
	}
}

// TestRetryable: which failures are worth another request.
func TestRetryable(t *testing.T) {
	ended, end := context.WithCancel(t.Context())
	end()
	soon, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	status := func(status int) error { return &Refusal{Status: status} }
	for name, row := range map[string]struct {
		ctx   context.Context
		err   error
		again bool
		least time.Duration
	}{
		"429":                  {t.Context(), status(429), true, 0},
		"503":                  {t.Context(), status(503), true, 0},
		"503, sealed":          {t.Context(), &Refusal{Status: 503, Texts: []string{"Vault is sealed"}}, false, 0},
		"503, OpenBao sealed":  {t.Context(), &Refusal{Status: 503, Texts: []string{"OpenBao is sealed"}}, false, 0},
		"412":                  {t.Context(), status(412), true, 0},
		"502":                  {t.Context(), status(502), true, 0},
		"504":                  {t.Context(), status(504), true, 0},
		"400":                  {t.Context(), status(400), false, 0},
		"403":                  {t.Context(), status(403), false, 0},
		"500":                  {t.Context(), status(500), false, 0},
		"ended":                {ended, status(503), false, 0},
		"in a while":           {soon, &Refusal{Status: 429, RetryAfter: 2 * time.Second}, true, 2 * time.Second},
		"in a while, no limit": {t.Context(), &Refusal{Status: 429, RetryAfter: 2 * time.Minute}, true, 2 * time.Minute},
		"after the deadline":   {soon, &Refusal{Status: 429, RetryAfter: 2 * time.Minute}, false, 0},
		"breaks off":           {t.Context(), syscall.ECONNRESET, true, 0},
		"refused":              {t.Context(), syscall.ECONNREFUSED, false, 0},
		"a gateway's page":     {t.Context(), &NotVault{Status: 502}, true, 0},
		"a proxy's limit":      {t.Context(), &NotVault{Status: 429}, true, 0},
		"a proxy's page":       {t.Context(), &NotVault{Status: 200}, false, 0},
	} {
		err := retryable(row.ctx, row.err)
		var permanent *backoff.PermanentError
		if again := !errors.As(err, &permanent); again != row.again {
			t.Errorf("%s: another request: %v", name, again)
		}
		after, ok := errors.AsType[*backoff.RetryAfterError](err)
		if ok != (row.least > 0) || ok && (after.Duration < row.least || after.Duration > row.least+row.least/4+firstWait) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if a, b := jitter(time.Hour), jitter(time.Hour); a == b || a < 0 || a >= time.Hour {
		t.Errorf("jitter %v, %v", a, b)
	}
}

// pieces is a connection that yields these bytes, as many as are asked for.
type pieces struct {
	net.Conn
	io.Reader
}

func (p pieces) Read(b []byte) (int, error) { return p.Reader.Read(b) }

// TestRecords: a Read ends where a header or a payload of a TLS record ends, and the budget
// limits what is read.
func TestRecords(t *testing.T) {
	stream := []byte{23, 3, 3, 1, 2}
	stream = append(append(stream, bytes.Repeat([]byte{7}, 0x102)...), 23, 3, 3, 0, 1, 9, 23, 3, 3, 0, 0, 23, 3, 3, 0, 1, 8)
	c := &wipedConn{Conn: pieces{Reader: bytes.NewReader(stream)}, budget: len(stream)}
	var sizes []int
	for {
		n, err := c.Read(make([]byte, 1000))
		if err != nil {
			break
		}
		sizes = append(sizes, n)
	}
	if want := []int{5, 0x102, 5, 1, 5, 5, 1}; !slices.Equal(sizes, want) {
		t.Errorf("reads of %v bytes, want %v", sizes, want)
	}
	c = &wipedConn{Conn: pieces{Reader: bytes.NewReader(stream)}, budget: len(stream) - 1}
	if _, err := io.Copy(io.Discard, bufio.NewReader(c)); !errors.Is(err, ErrHeaders) {
		t.Errorf("over the budget: %v", err)
	}
}

// TestContentType: no answer but JSON is read.
func TestContentType(t *testing.T) {
	for header, good := range map[string]bool{"application/json": true, "application/json; charset=utf-8": true, "": false, "text/html": false, "application/json;;": false, "application/jsonp": false} {
		if err := checkType(&http.Response{StatusCode: 200, Header: http.Header{"Content-Type": {header}}}); (err == nil) != good {
			t.Errorf("%q: %v", header, err)
		}
	}
	for status, good := range map[int]bool{200: false, 204: true, 307: true, 404: false} {
		if err := checkType(&http.Response{StatusCode: status, Header: http.Header{}}); (err == nil) != good {
			t.Errorf("%d without a type: %v", status, err)
		}
	}
}

// TestNothingIsLeft: what a client has received and sent is cleared at its end.
func TestNothingIsLeft(t *testing.T) {
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write([]byte(`{"data":{"plaintext":"aGVsbG8="}}`))
	}))
	defer server.Close()
	pool := x509.NewCertPool()
	pool.AddCert(server.Certificate())
	var keyFailed error
	s, err := New(server.URL, "", &tls.Config{RootCAs: pool}, &keyFailed)
	if err != nil {
		t.Fatal(err)
	}
	s.UseToken("hvs.token")
	s.Withhold([]byte("aGVsbG8="))
	var before []byte
	for range 2 {
		before = s.wire.body
		if _, err := s.Call(t.Context(), Request{Path: "transit/encrypt/kleidi", Body: []byte(`{"plaintext":"aGVsbG8="}`)}); err != nil {
			t.Fatal(err)
		}
	}
	kept := map[string][]byte{"the last answer": s.wire.body, "the answer before": before}
	for i, b := range s.secrets {
		kept[fmt.Sprintf("secret %d", i)] = b
	}
	for i, b := range s.wire.raw.buffers {
		kept[fmt.Sprintf("record %d", i)] = b
	}
	if len(s.secrets) != 2 || len(s.wire.raw.buffers) < 4 || s.api.Token() != "hvs.token" {
		t.Fatalf("%d secrets, %d records", len(s.secrets), len(s.wire.raw.buffers))
	}
	in, raw, conn := s.wire.in, s.wire.raw, s.wire.raw.Conn
	s.Close()
	for name, b := range kept {
		if len(bytes.Trim(b, "\x00")) > 0 {
			t.Errorf("%s is left: %q", name, b)
		}
	}
	if b, err := in.Peek(readBuffer); err != nil || len(bytes.Trim(b, "\x00")) > 0 {
		t.Errorf("the buffer of the answers is left: %v", err)
	}
	if s.api.Token() != "" || s.secrets != nil || raw.buffers != nil || s.wire.conn != nil || s.wire.body != nil {
		t.Error("the token, the secrets or the connection are left")
	}
	if _, err := conn.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the connection is open: %v", err)
	}
}
