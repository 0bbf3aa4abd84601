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

// Retries within one operation. What lasts longer is for the caller to try again.
const (
	maxTries     = 4
	firstWait    = 200 * time.Millisecond
	longestWait  = 3 * time.Second
	revokeWithin = 2 * time.Second
)

// session is one operation: a connection, and a token that is given back at its end.
// It is used by one goroutine.
type session struct {
	config Config
	wire   *wire
	client *api.Client
	// secrets are what was sent; no message may quote them.
	secrets [][]byte
	revoke  bool // the token is ours to revoke
	// keyFailed is why the client certificate's key failed, if it did.
	keyFailed error
}

// request is one call of the API.
type request struct {
	path string
	// body is JSON that the caller clears; nil is a GET.
	body []byte
	// capability is what a token needs on path.
	capability string
}

// in runs f with a session that has logged in.
func (w *Wrapper) in(ctx context.Context, f func(ctx context.Context, s *session) error) error {
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
	defer s.giveBack(ctx)
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

// newClient makes a client that has nothing from the environment. The library reads
// VAULT_TOKEN, VAULT_NAMESPACE and VAULT_HEADERS into every client, VAULT_WRAP_TTL
// into every request, and the rest into a configuration that is not used here.
func newClient(address, namespace string, transport http.RoundTripper) (*api.Client, error) {
	client, err := api.NewClient(&api.Config{
		Address: address,
		HttpClient: &http.Client{
			Transport:     transport,
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		DisableRedirects: true, // the library would send another body; see session.send
		CheckRetry:       func(context.Context, *http.Response, error) (bool, error) { return false, nil },
	})
	if err != nil {
		// The address was checked before: it is a variable of the environment that
		// doesn't parse. The error may quote it.
		return nil, seal.Errorf(seal.CauseUnavailable, "unset them; kleidi reads its configuration file only",
			"vault: the client library refuses the environment, where these are set: %s", strings.Join(libraryVariables(), ", "))
	}
	client.SetHeaders(http.Header{api.RequestHeaderName: {"true"}})
	client.ClearToken()
	client.SetWrappingLookupFunc(func(string, string) string { return "" })
	if namespace != "" {
		client.SetNamespace(namespace)
	}
	return client, nil
}

// libraryVariables names the variables that the client library looks at.
func libraryVariables() (names []string) {
	for _, variable := range os.Environ() {
		if name, _, _ := strings.Cut(variable, "="); strings.HasPrefix(name, "VAULT_") {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// close ends the connection and forgets the token.
func (s *session) close() {
	s.client.ClearToken()
	for _, b := range s.secrets {
		clear(b)
	}
	s.secrets = nil
	s.wire.close()
}

// giveBack revokes the token, also when the operation was cancelled. Without an
// answer the token ends by its TTL.
func (s *session) giveBack(ctx context.Context) {
	if !s.revoke {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), revokeWithin)
	defer cancel()
	_, _ = s.send(ctx, request{path: "auth/token/revoke-self", body: []byte("{}")})
}

// useToken makes a token the session's.
func (s *session) useToken(token string) {
	s.secrets = append(s.secrets, []byte(token))
	s.client.SetToken(token)
}

// call sends a request until it is answered, refused for good, or time is up. The
// answer is valid until the next call; the error is not explained yet.
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

// retryable says whether, and when, a request may be sent again.
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
	if r.after == 0 {
		return err
	}
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < r.after {
		return backoff.Permanent(err) // it would only be told to wait again
	}
	return &backoff.RetryAfterError{Duration: r.after + jitter(r.after/4+firstWait)}
}

// jitter is a random time below limit, so that nodes that were told the same don't
// come back together.
func jitter(limit time.Duration) time.Duration {
	n, err := rand.Int(rand.Reader, big.NewInt(int64(limit)))
	if err != nil {
		return 0
	}
	return time.Duration(n.Int64())
}

// send sends a request once, and once more to where a standby server sends it.
func (s *session) send(ctx context.Context, r request) ([]byte, error) {
	res, err := s.once(ctx, r)
	if err == nil && res.StatusCode/100 == 3 {
		if err = s.follow(res); err == nil {
			if res, err = s.once(ctx, r); err == nil && res.StatusCode/100 == 3 {
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
	errRedirect  = errors.New("it redirects to what is not https://HOST:PORT and the same path")
)

// follow goes to the server that a standby names, which must have a certificate of
// the same CA. Only the host and port are taken.
func (s *session) follow(res *api.Response) error {
	location, err := res.Location()
	if err != nil || location.Scheme != "https" || location.User != nil || location.Path != res.Request.URL.Path {
		return errRedirect
	}
	return s.client.SetAddress("https://" + location.Host)
}

func (s *session) once(ctx context.Context, r request) (*api.Response, error) {
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
		return nil, &refusal{status: e.StatusCode, texts: e.Errors, after: retryAfter(res)}
	}
	if err == nil && (res == nil || res.Response == nil) {
		err = fmt.Errorf("no answer")
	}
	return res, err
}

// retryAfter reads the header in its form of seconds, which is what Vault sends.
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
