// Package client speaks with one Vault or OpenBao server over one connection: it sends
// requests, repeats them, follows a standby server once, and says what the server refused.
// At its end it clears everything that it sent and received. It knows nothing of logins
// and remedies.
package client

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
	maxTries    = 4
	firstWait   = 200 * time.Millisecond
	longestWait = 3 * time.Second
)

// Client is the connection of one operation. One goroutine uses it.
type Client struct {
	wire      *wire
	api       *api.Client
	secrets   [][]byte // the secrets that were sent; no message may quote them
	keyFailed *error
}

// Request is a request to the API.
type Request struct {
	Path string
	// Body is JSON, which the caller clears. If it is nil, the request is a GET.
	Body []byte
	// Capability is the capability that a token needs on Path.
	Capability string
}

// New returns a client, which is not connected yet. During a request, *keyFailed becomes the
// failure of the client certificate's key: crypto/tls keeps only its text.
func New(address, namespace string, config *tls.Config, keyFailed *error) (*Client, error) {
	w := &wire{tls: config}
	library, err := newClient(address, namespace, w)
	if err != nil {
		return nil, err
	}
	return &Client{wire: w, api: library, keyFailed: keyFailed}, nil
}

// Withhold keeps messages from quoting a secret, which is cleared at the end.
func (s *Client) Withhold(secret []byte) { s.secrets = append(s.secrets, secret) }

// ClearToken removes the token of the client.
func (s *Client) ClearToken() { s.api.ClearToken() }

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
		DisableRedirects: true, // the library would send the request without its body; see Client.Send
		CheckRetry:       func(context.Context, *http.Response, error) (bool, error) { return false, nil },
	})
	if err != nil {
		// The address is valid, so a variable of the environment is not. The error may quote
		// its value.
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

// Close closes the connection and clears the secrets.
func (s *Client) Close() {
	s.api.ClearToken()
	for _, b := range s.secrets {
		clear(b)
	}
	s.secrets = nil
	s.wire.close()
}

// UseToken sets the token of the session.
func (s *Client) UseToken(token string) {
	s.secrets = append(s.secrets, []byte(token))
	s.api.SetToken(token)
}

// Call sends a request, again and again, until it is answered or refused for good, or
// until ctx ends. The answer is valid until the next call. The error is not explained yet.
func (s *Client) Call(ctx context.Context, r Request) ([]byte, error) {
	wait := backoff.NewExponentialBackOff()
	wait.InitialInterval, wait.MaxInterval = firstWait, longestWait
	var last error
	body, err := backoff.Retry(ctx, func() ([]byte, error) {
		var b []byte
		if b, last = s.Send(ctx, r); last == nil {
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
	r, refused := errors.AsType[*Refusal](err)
	switch {
	case ctx.Err() != nil:
		return backoff.Permanent(err)
	case !refused:
		if temporary(err) {
			return err
		}
		return backoff.Permanent(err)
	case r.Status == http.StatusTooManyRequests || r.Status == http.StatusServiceUnavailable && !r.Sealed():
	case r.Status == http.StatusPreconditionFailed, r.Status == http.StatusBadGateway, r.Status == http.StatusGatewayTimeout:
	default:
		return backoff.Permanent(err)
	}
	if r.RetryAfter == 0 {
		return err
	}
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < r.RetryAfter {
		return backoff.Permanent(err) // the server would refuse an earlier request too
	}
	return &backoff.RetryAfterError{Duration: r.RetryAfter + jitter(r.RetryAfter/4+firstWait)}
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

// Send sends a request. If a standby server redirects it, Send sends it once more, to the
// other server.
func (s *Client) Send(ctx context.Context, r Request) ([]byte, error) {
	res, err := s.sendOnce(ctx, r)
	if err == nil && res.StatusCode/100 == 3 {
		if err = s.follow(res); err == nil {
			if res, err = s.sendOnce(ctx, r); err == nil && res.StatusCode/100 == 3 {
				err = ErrRedirects
			}
		}
	}
	if err != nil {
		return nil, err
	}
	return s.wire.body, nil
}

var (
	ErrRedirects = errors.New("it redirects to a server that redirects again")
	ErrRedirect  = errors.New("it redirects to something other than https://HOST:PORT and the same path")
)

// follow sets the address to the server that a standby names. Only its host and port are
// used. That server needs a certificate of the same CA.
func (s *Client) follow(res *api.Response) error {
	location, err := res.Location()
	if err != nil || location.Scheme != "https" || location.User != nil || location.Path != res.Request.URL.Path {
		return ErrRedirect
	}
	return s.api.SetAddress("https://" + location.Host)
}

func (s *Client) sendOnce(ctx context.Context, r Request) (*api.Response, error) {
	var res *api.Response
	var err error
	if r.Body == nil {
		res, err = s.api.Logical().ReadRawWithContext(ctx, r.Path)
	} else {
		res, err = s.api.Logical().WriteRawWithContext(ctx, r.Path, r.Body)
	}
	if err != nil && *s.keyFailed != nil {
		return nil, *s.keyFailed
	}
	if e, ok := errors.AsType[*api.ResponseError](err); ok {
		return nil, &Refusal{Status: e.StatusCode, Texts: e.Errors, RetryAfter: retryAfter(res)}
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

// Quote returns the status and the text of a refusal. It leaves out a text that repeats a
// secret.
func (s *Client) Quote(r *Refusal) string {
	text := strings.Join(r.Lines(), "; ")
	for _, secret := range s.secrets {
		if repeats(text, secret) {
			return fmt.Sprintf("status %d (its text is withheld, because it repeats a secret)", r.Status)
		}
	}
	if text == "" {
		return fmt.Sprintf("status %d", r.Status)
	}
	if len(text) > MaxQuoted {
		text = text[:MaxQuoted] + "…"
	}
	return fmt.Sprintf("status %d, %q", r.Status, text)
}
