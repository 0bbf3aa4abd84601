package vault

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/vault/internal/client"
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
		"ends in a handshake":    {&client.HandshakeError{Err: io.EOF}, "", seal.CauseUnavailable, "ends connections"},
		"another handshake":      {&client.HandshakeError{Err: errors.New("no cipher suite")}, "", seal.CauseUnavailable, "TLS settings of the server's listener"},
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
	long := Config{}.explainTransport(&client.HandshakeError{Err: errors.New(strings.Repeat("x", 10*client.MaxQuoted))})
	if n := strings.Count(long.Error(), "x"); n != client.MaxQuoted {
		t.Errorf("a long error is quoted with %d bytes, want %d", n, client.MaxQuoted)
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
