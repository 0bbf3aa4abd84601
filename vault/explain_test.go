package vault

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/beezy-dev/kleidi/seal"
)

// TestExplainTransport: each failure on the way to the server has its own remedy.
func TestExplainTransport(t *testing.T) {
	remote := &net.OpError{Op: "remote error", Err: errors.New("tls: bad certificate")}
	dial := func(err error) error { return &net.OpError{Op: "dial", Net: "tcp", Err: err} }
	for name, row := range map[string]struct {
		err    error
		method Method
		cause  seal.Cause
		hint   string
	}{
		"no such host":           {dial(&net.DNSError{Err: "no such host", Name: "vault"}), "", seal.CauseUnavailable, "name service"},
		"refused":                {dial(syscall.ECONNREFUSED), "", seal.CauseUnavailable, "start the server"},
		"host unreachable":       {dial(syscall.EHOSTUNREACH), "", seal.CauseUnavailable, "firewalls"},
		"network unreachable":    {dial(syscall.ENETUNREACH), "", seal.CauseUnavailable, "firewalls"},
		"ends":                   {io.EOF, "", seal.CauseUnavailable, "ends connections"},
		"ends early":             {io.ErrUnexpectedEOF, "", seal.CauseUnavailable, "ends connections"},
		"reset":                  {syscall.ECONNRESET, "", seal.CauseUnavailable, "ends connections"},
		"broken pipe":            {syscall.EPIPE, "", seal.CauseUnavailable, "ends connections"},
		"ends in a handshake":    {&handshakeError{io.EOF}, "", seal.CauseUnavailable, "ends connections"},
		"another handshake":      {&handshakeError{errors.New("no cipher suite")}, "", seal.CauseUnavailable, "TLS settings of the server's listener"},
		"plain text":             {tls.RecordHeaderError{Msg: "first record does not look like a TLS handshake"}, "", seal.CauseUnavailable, "correct the port"},
		"alert":                  {remote, "", seal.CauseUnavailable, "TLS settings of the server's listener"},
		"alert to a certificate": {remote, MethodCert, seal.CauseCredentials, "admits this client certificate"},
		"another":                {errors.New("odd"), "", seal.CauseUnavailable, "check that it is up, and run the command again"},
		"another of the net":     {&net.OpError{Op: "read", Err: errors.New("odd")}, MethodCert, seal.CauseUnavailable, "check that it is up, and run the command again"},
		"cancelled":              {context.Canceled, "", seal.CauseUnavailable, "run the command again"},
		"late":                   {context.DeadlineExceeded, "", seal.CauseUnavailable, "raise vault.timeout"},
		"late, says the kernel":  {os.ErrDeadlineExceeded, "", seal.CauseUnavailable, "raise vault.timeout"},
	} {
		t.Run(name, func(t *testing.T) {
			c := Config{Address: "https://vault:8200", Timeout: time.Second, Auth: Auth{Method: row.method}}
			for _, err := range []error{row.err, &url.Error{Op: "Put", URL: "https://vault:8200/v1/secret-path", Err: row.err}} {
				err = c.explainTransport(err)
				checkError(t, err, row.cause, nil)
				if _, hint := seal.SplitHint(err); !strings.Contains(hint, row.hint) {
					t.Errorf("the hint %q does not say %q", hint, row.hint)
				}
				if strings.Contains(err.Error(), "secret-path") {
					t.Errorf("%v names the URL", err)
				}
			}
		})
	}
	long := Config{}.explainTransport(&handshakeError{errors.New(strings.Repeat("x", 10*maxQuoted))})
	if n := strings.Count(long.Error(), "x"); n != maxQuoted {
		t.Errorf("a long error is quoted with %d bytes, want %d", n, maxQuoted)
	}
}

// TestForbidden: a refusal is explained by the capabilities that the token has.
func TestForbidden(t *testing.T) {
	const decrypt = "transit/decrypt/kleidi"
	for name, row := range map[string]struct {
		path, capabilities string
		status             int
		cause              seal.Cause
		is                 error
		says               string
	}{
		"encrypt, no capability": {encrypt, `"deny"`, 200, seal.CauseCredentials, ErrDenied, `grant it the capability "update" on the path "transit/encrypt/kleidi"`},
		"encrypt, no key":        {encrypt, `"update"`, 200, seal.CauseKeyMissing, ErrKeyMissing, ""},
		"decrypt, no capability": {decrypt, `"read"`, 200, seal.CauseCredentials, ErrDenied, `grant it the capability "update" on the path "transit/decrypt/kleidi"`},
		"decrypt, another rule":  {decrypt, `"update"`, 200, seal.CauseCredentials, ErrDenied, "control group"},
		"decrypt, no answer":     {decrypt, `"update"`, 404, seal.CauseCredentials, ErrDenied, `grant it the capability "update"`},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWrapper(t, newFake(t, func(w http.ResponseWriter, r *http.Request, n int) bool {
				return at(row.path, 403, `{"errors":["1 error occurred:\n\t* permission denied\n\n"]}`)(w, r, n) ||
					at("sys/capabilities-self", row.status, `{"data":{"capabilities":[`+row.capabilities+`]}}`)(w, r, n)
			}).config())
			_, err := w.Wrap(t.Context(), newKEK(t))
			if row.path == decrypt {
				_, err = w.Unwrap(t.Context(), slotOf(t, w, "vault:v1:AAAA"))
			}
			checkError(t, err, row.cause, row.is, row.says)
		})
	}
}

// TestLoginRefused: Vault gives one answer to a wrong role and to a wrong mount.
func TestLoginRefused(t *testing.T) {
	for body, mount := range map[string]bool{`{"errors":["permission denied"]}`: true, `{"errors":["invalid secret id"]}`: false, `{"errors":[]}`: false} {
		_, err := newWrapper(t, newFake(t, at("auth/approle/login", 400, body)).config()).Wrap(t.Context(), newKEK(t))
		checkError(t, err, seal.CauseCredentials, ErrLogin, "status 400", "put a new secret ID")
		if says := strings.Contains(err.Error(), "that vault.auth.mount is right"); says != mount {
			t.Errorf("%s: %v", body, err)
		}
		if body == `{"errors":[]}` && strings.Contains(err.Error(), `""`) {
			t.Errorf("%v quotes nothing", err)
		}
	}
}

func TestLines(t *testing.T) {
	for text, want := range map[string][]string{
		"permission denied":                              {"permission denied"},
		"an error of the storage":                        {"an error of the storage"},
		"1 error occurred:\n\t* sealed\n\n":              {"sealed"},
		"2 errors occurred:\n\t* sealed\n\t* denied\n\n": {"sealed", "denied"},
		"a change occurred:\n* sealed":                   {"a change occurred:", "sealed"},
		" \n\n":                                          nil,
	} {
		if got := (&refusal{texts: []string{text}}).lines(); !slices.Equal(got, want) {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
	s := &session{}
	if got := s.quote(&refusal{status: 400, texts: []string{strings.Repeat("x", maxQuoted+1)}}); strings.Count(got, "x") != maxQuoted || !strings.Contains(got, "…") {
		t.Error(got)
	}
	if got := s.quote(&refusal{status: 400, texts: []string{strings.Repeat("x", maxQuoted)}}); strings.Contains(got, "…") {
		t.Error(got)
	}
	s.secrets = [][]byte{nil, []byte(`s"e\t`)}
	for _, text := range []string{`bad s"e\t`, `bad s\"e\\t`, `bad 7322655c74`, `bad cyJlXHQ`} {
		if got := s.quote(&refusal{status: 400, texts: []string{text}}); !strings.Contains(got, "withheld") {
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
	status := func(status int) error { return &refusal{status: status} }
	for name, row := range map[string]struct {
		ctx   context.Context
		err   error
		again bool
		least time.Duration
	}{
		"429":                  {t.Context(), status(429), true, 0},
		"503":                  {t.Context(), status(503), true, 0},
		"503, sealed":          {t.Context(), &refusal{status: 503, texts: []string{"Vault is sealed"}}, false, 0},
		"503, OpenBao sealed":  {t.Context(), &refusal{status: 503, texts: []string{"OpenBao is sealed"}}, false, 0},
		"412":                  {t.Context(), status(412), true, 0},
		"502":                  {t.Context(), status(502), true, 0},
		"504":                  {t.Context(), status(504), true, 0},
		"400":                  {t.Context(), status(400), false, 0},
		"403":                  {t.Context(), status(403), false, 0},
		"500":                  {t.Context(), status(500), false, 0},
		"ended":                {ended, status(503), false, 0},
		"in a while":           {soon, &refusal{status: 429, retryAfter: 2 * time.Second}, true, 2 * time.Second},
		"in a while, no limit": {t.Context(), &refusal{status: 429, retryAfter: 2 * time.Minute}, true, 2 * time.Minute},
		"after the deadline":   {soon, &refusal{status: 429, retryAfter: 2 * time.Minute}, false, 0},
		"breaks off":           {t.Context(), syscall.ECONNRESET, true, 0},
		"refused":              {t.Context(), syscall.ECONNREFUSED, false, 0},
		"a gateway's page":     {t.Context(), &notVault{status: 502}, true, 0},
		"a proxy's limit":      {t.Context(), &notVault{status: 429}, true, 0},
		"a proxy's page":       {t.Context(), &notVault{status: 200}, false, 0},
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

// TestNothingIsLeft: what a session has received and sent is cleared at its end.
func TestNothingIsLeft(t *testing.T) {
	f := newFake(t, nil)
	w := newWrapper(t, f.config())
	s, err := w.newSession(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := w.login(t.Context(), s); err != nil {
		t.Fatal(err)
	}
	first := s.wire.body
	if _, err := s.call(t.Context(), request{path: encrypt, body: []byte(`{"plaintext":"aGVsbG8="}`)}); err != nil {
		t.Fatal(err)
	}
	kept := map[string][]byte{"the last answer": s.wire.body, "the answer before": first}
	for i, b := range s.secrets {
		kept[fmt.Sprintf("secret %d", i)] = b
	}
	for i, b := range s.wire.raw.buffers {
		kept[fmt.Sprintf("record %d", i)] = b
	}
	if len(s.secrets) < 2 || len(s.wire.raw.buffers) < 4 || s.client.Token() != fakeToken {
		t.Fatalf("%d secrets, %d records", len(s.secrets), len(s.wire.raw.buffers))
	}
	in, raw, conn := s.wire.in, s.wire.raw, s.wire.raw.Conn
	s.close()
	for name, b := range kept {
		if len(bytes.Trim(b, "\x00")) > 0 {
			t.Errorf("%s is left: %q", name, b)
		}
	}
	if b, err := in.Peek(readBuffer); err != nil || len(bytes.Trim(b, "\x00")) > 0 {
		t.Errorf("the buffer of the answers is left: %v", err)
	}
	if s.client.Token() != "" || s.secrets != nil || raw.buffers != nil || s.wire.conn != nil || s.wire.body != nil {
		t.Error("the token, the secrets or the connection are left")
	}
	if _, err := conn.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the connection is open: %v", err)
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
	if _, err := io.Copy(io.Discard, bufio.NewReader(c)); !errors.Is(err, errHeaders) {
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
