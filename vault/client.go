package vault

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"math/big"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/hashicorp/vault/api"

	"github.com/beezy-dev/kleidi/seal"
)

// Retries within one operation. After them the caller tries again.
const (
	maxTries      = 4
	firstWait     = 200 * time.Millisecond
	longestWait   = 3 * time.Second
	revokeTimeout = 2 * time.Second
)

// session is the connection of one operation, and the token that is revoked at its end.
// One goroutine uses it.
type session struct {
	config  Config
	wire    *wire
	client  *api.Client
	secrets [][]byte // the secrets that were sent; no message may quote them
	revoke  bool     // whether the session revokes its token at the end
	// keyFailed is the failure of the client certificate's key, or nil.
	keyFailed error
}

// request is a request to the API.
type request struct {
	path string
	// body is JSON, which the caller clears. If it is nil, the request is a GET.
	body []byte
	// capability is the capability that a token needs on path.
	capability string
}

// withSession calls f with a session that is logged in.
func (w *Wrapper) withSession(ctx context.Context, f func(ctx context.Context, s *session) error) error {
	ctx, cancel := context.WithTimeout(ctx, w.config.Timeout)
	defer cancel()
	if err := ctx.Err(); err != nil {
		return w.config.explainTransport(err)
	}
	s, err := w.newSession(ctx)
	if err != nil {
		return err
	}
	defer s.close()
	if err := w.login(ctx, s); err != nil {
		return err
	}
	defer s.revokeToken(ctx)
	return f(ctx, s)
}

func (w *Wrapper) newSession(ctx context.Context) (*session, error) {
	pool, err := roots(w.config.CAFile)
	if err != nil {
		return nil, err
	}
	s := &session{config: w.config}
	config := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: pool, ServerName: w.config.ServerName}
	if w.config.Auth.Method == MethodCert {
		certificate, err := w.config.Auth.clientCertificate(ctx, &s.keyFailed)
		if err != nil {
			return nil, err
		}
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return certificate, nil }
	}
	s.wire = &wire{tls: config}
	s.client, err = newClient(w.config.Address, w.config.Namespace, s.wire)
	return s, err
}

// newClient returns a client that takes nothing from the environment. The library reads
// VAULT_TOKEN, VAULT_NAMESPACE and VAULT_HEADERS for every client, VAULT_WRAP_TTL for
// every request, and the other variables into a configuration that is not used here.
func newClient(address, namespace string, transport http.RoundTripper) (*api.Client, error) {
	client, err := api.NewClient(&api.Config{
		Address: address,
		HttpClient: &http.Client{
			Transport:     transport,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		DisableRedirects: true, // the library would send the request without its body; see session.send
		CheckRetry:       func(context.Context, *http.Response, error) (bool, error) { return false, nil },
	})
	if err != nil {
		// The address is valid, so a variable of the environment is not. The error may
		// quote its value.
		return nil, seal.Errorf(seal.CauseUnavailable, "unset them; kleidi reads its configuration file only",
			"vault: the client library refuses one of these variables of the environment: %s", strings.Join(libraryVariables(), ", "))
	}
	client.SetHeaders(http.Header{api.RequestHeaderName: {"true"}})
	client.ClearToken()
	client.SetWrappingLookupFunc(func(string, string) string { return "" })
	if namespace != "" {
		client.SetNamespace(namespace)
	}
	return client, nil
}

// libraryVariables returns the names of the variables that the client library reads.
func libraryVariables() (names []string) {
	for _, variable := range os.Environ() {
		if name, _, _ := strings.Cut(variable, "="); strings.HasPrefix(name, "VAULT_") {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// close closes the connection and clears the secrets.
func (s *session) close() {
	s.client.ClearToken()
	for _, b := range s.secrets {
		clear(b)
	}
	s.secrets = nil
	s.wire.close()
}

// revokeToken revokes the token, even if the operation was cancelled. If the server does
// not answer, the token expires by its TTL.
func (s *session) revokeToken(ctx context.Context) {
	if !s.revoke {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), revokeTimeout)
	defer cancel()
	_, _ = s.send(ctx, request{path: "auth/token/revoke-self", body: []byte("{}")})
}

// useToken sets the token of the session.
func (s *session) useToken(token string) {
	s.secrets = append(s.secrets, []byte(token))
	s.client.SetToken(token)
}

// call sends a request, again and again, until it is answered or refused for good, or
// until ctx ends. The answer is valid until the next call. The error is not explained yet.
func (s *session) call(ctx context.Context, r request) ([]byte, error) {
	wait := backoff.NewExponentialBackOff()
	wait.InitialInterval, wait.MaxInterval = firstWait, longestWait
	var last error
	body, err := backoff.Retry(ctx, func() ([]byte, error) {
		var b []byte
		if b, last = s.send(ctx, r); last == nil {
			return b, nil
		}
		return nil, retryable(ctx, last)
	}, backoff.WithBackOff(wait), backoff.WithMaxTries(maxTries))
	if err != nil && ctx.Err() != nil && last == nil {
		last = ctx.Err()
	}
	if err != nil {
		return nil, last
	}
	return body, nil
}

// retryable returns err in the form that tells backoff.Retry whether, and when, to send
// the request again.
func retryable(ctx context.Context, err error) error {
	r, refused := errors.AsType[*refusal](err)
	switch {
	case ctx.Err() != nil:
		return backoff.Permanent(err)
	case !refused:
		if temporary(err) {
			return err
		}
		return backoff.Permanent(err)
	case r.status == http.StatusTooManyRequests || r.status == http.StatusServiceUnavailable && !r.sealed():
	case r.status == http.StatusPreconditionFailed, r.status == http.StatusBadGateway, r.status == http.StatusGatewayTimeout:
	default:
		return backoff.Permanent(err)
	}
	if r.retryAfter == 0 {
		return err
	}
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < r.retryAfter {
		return backoff.Permanent(err) // the server would refuse an earlier request too
	}
	return &backoff.RetryAfterError{Duration: r.retryAfter + jitter(r.retryAfter/4+firstWait)}
}

// jitter returns a random time below limit, so that nodes with the same Retry-After don't
// send their requests at the same time.
func jitter(limit time.Duration) time.Duration {
	n, err := rand.Int(rand.Reader, big.NewInt(int64(limit)))
	if err != nil {
		return 0
	}
	return time.Duration(n.Int64())
}

// send sends a request. If a standby server redirects it, send sends it once more, to the
// other server.
func (s *session) send(ctx context.Context, r request) ([]byte, error) {
	res, err := s.sendOnce(ctx, r)
	if err == nil && res.StatusCode/100 == 3 {
		if err = s.follow(res); err == nil {
			if res, err = s.sendOnce(ctx, r); err == nil && res.StatusCode/100 == 3 {
				err = errRedirects
			}
		}
	}
	if err != nil {
		return nil, err
	}
	return s.wire.body, nil
}

var (
	errRedirects = errors.New("it redirects to a server that redirects again")
	errRedirect  = errors.New("it redirects to something other than https://HOST:PORT and the same path")
)

// follow sets the address to the server that a standby names. Only its host and port are
// used. That server needs a certificate of the same CA.
func (s *session) follow(res *api.Response) error {
	location, err := res.Location()
	if err != nil || location.Scheme != "https" || location.User != nil || location.Path != res.Request.URL.Path {
		return errRedirect
	}
	return s.client.SetAddress("https://" + location.Host)
}

func (s *session) sendOnce(ctx context.Context, r request) (*api.Response, error) {
	var res *api.Response
	var err error
	if r.body == nil {
		res, err = s.client.Logical().ReadRawWithContext(ctx, r.path)
	} else {
		res, err = s.client.Logical().WriteRawWithContext(ctx, r.path, r.body)
	}
	if err != nil && s.keyFailed != nil {
		return nil, s.keyFailed
	}
	if e, ok := errors.AsType[*api.ResponseError](err); ok {
		return nil, &refusal{status: e.StatusCode, texts: e.Errors, retryAfter: retryAfter(res)}
	}
	if err == nil && (res == nil || res.Response == nil) {
		err = fmt.Errorf("no answer")
	}
	return res, err
}

// retryAfter parses the header Retry-After in seconds, as Vault sends it.
func retryAfter(res *api.Response) time.Duration {
	if res == nil || res.Response == nil {
		return 0
	}
	seconds, err := strconv.ParseUint(res.Header.Get("Retry-After"), 10, 16)
	if err != nil {
		return 0
	}
	return time.Duration(seconds) * time.Second
}
