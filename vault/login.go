package vault

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/vault/internal/client"
	"github.com/beezy-dev/kleidi/vault/internal/credfile"
)

// login logs in, so that the session has a token.
func (w *Wrapper) login(ctx context.Context, s *session) error {
	a := w.config.Auth
	switch a.Method {
	case MethodToken:
		return credfile.With("auth.tokenFile", a.TokenFile, credfile.OwnerOnly, func(token []byte) error {
			s.UseToken(string(token))
			return nil
		})
	case MethodAppRole:
		return w.withSecretID(ctx, s, func(id []byte) error {
			return s.loginWith(ctx, field{"role_id", []byte(a.RoleID), false}, field{"secret_id", id, true})
		})
	case MethodKubernetes:
		return s.loginWithJWT(ctx, credfile.Anyone)
	case MethodJWT:
		return s.loginWithJWT(ctx, credfile.OwnerOnly)
	}
	if a.Role == "" {
		return s.loginWith(ctx)
	}
	return s.loginWith(ctx, field{"name", []byte(a.Role), false})
}

func (s *session) loginWithJWT(ctx context.Context, allowed credfile.Readers) error {
	return credfile.With("auth.jwtFile", s.config.Auth.JWTFile, allowed, func(jwt []byte) error {
		return s.loginWith(ctx, field{"role", []byte(s.config.Auth.Role), false}, field{"jwt", jwt, true})
	})
}

// field is a member of a JSON object. Its value is a string.
type field struct {
	name   string
	value  []byte // printable
	secret bool
}

// object returns the JSON object with these fields, in one buffer, which the caller
// clears.
func object(fields ...field) []byte {
	size := 2
	for _, f := range fields {
		size += len(f.name) + 2*len(f.value) + 6
	}
	b := append(make([]byte, 0, size), '{')
	for i, f := range fields {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(append(append(b, '"'), f.name...), `":"`...)
		for _, c := range f.value {
			if c == '"' || c == '\\' {
				b = append(b, '\\')
			}
			b = append(b, c)
		}
		b = append(b, '"')
	}
	return append(b, '}')
}

func (s *session) loginWith(ctx context.Context, fields ...field) error {
	body := object(fields...)
	defer clear(body)
	for _, f := range fields {
		if f.secret {
			s.Withhold(bytes.Clone(f.value))
		}
	}
	r := client.Request{Path: "auth/" + s.config.Auth.Mount + "/login", Body: body}
	answer, err := s.Call(ctx, r)
	if err != nil {
		return s.explainLogin(r, err)
	}
	var parsed struct {
		Auth struct {
			ClientToken string `json:"client_token"`
		} `json:"auth"`
	}
	err = json.Unmarshal(answer, &parsed)
	token := parsed.Auth.ClientToken
	if err != nil || token == "" || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return s.config.errorf(seal.CauseUnavailable, hintNotVault, "%s: %w: it holds no token", r.Path, ErrNotVault)
	}
	s.UseToken(token)
	s.revoke = true
	return nil
}

// withSecretID calls use with AppRole's secret ID.
func (w *Wrapper) withSecretID(ctx context.Context, s *session, use func(id []byte) error) error {
	a := w.config.Auth
	return credfile.With("auth.secretIDFile", a.SecretIDFile, credfile.OwnerOnly, func(b []byte) error {
		if !a.SecretIDWrapped {
			return use(b)
		}
		return w.withUnwrapped(ctx, s, b, use)
	})
}

// unwrapped is a secret ID from a response-wrapping token. Such a token can be unwrapped
// only once.
type unwrapped struct {
	token [sha256.Size]byte // digest of the wrapping token
	id    *seal.Secret
}

// withUnwrapped calls use with the secret ID that a token wraps.
func (w *Wrapper) withUnwrapped(ctx context.Context, s *session, token []byte, use func(id []byte) error) error {
	id, err := w.unwrapOnce(ctx, s, token)
	if err != nil {
		return err
	}
	defer clear(id)
	return use(id)
}

// unwrapOnce returns the secret ID that a token wraps, which the caller clears. It unwraps
// the token if that was not done before. Only one goroutine unwraps at a time, because a
// token can't be unwrapped twice. The others wait until ctx ends at most.
func (w *Wrapper) unwrapOnce(ctx context.Context, s *session, token []byte) ([]byte, error) {
	digest := sha256.Sum256(token)
	if id := w.cachedSecretID(digest); id != nil {
		return id, nil
	}
	select {
	case w.unwrapping <- struct{}{}:
		defer func() { <-w.unwrapping }()
	case <-ctx.Done():
		return nil, w.config.explainTransport(ctx.Err())
	}
	if id := w.cachedSecretID(digest); id != nil {
		return id, nil
	}
	// If the caller goes away now, the secret ID must still be cached, because the server
	// gives it out only once.
	deadline, _ := ctx.Deadline() // withSession sets one
	ctx, cancel := context.WithDeadline(context.WithoutCancel(ctx), deadline)
	defer cancel()
	secret, err := s.unwrap(ctx, token)
	if err != nil {
		return nil, err
	}
	return w.cacheSecretID(&unwrapped{digest, secret}), nil
}

// cachedSecretID returns a copy of the cached secret ID if it is from this token, or nil.
func (w *Wrapper) cachedSecretID(token [sha256.Size]byte) []byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.secretID == nil || w.secretID.token != token {
		return nil
	}
	return w.secretID.copyID()
}

// cacheSecretID caches a secret ID until Close, and returns a copy.
func (w *Wrapper) cacheSecretID(u *unwrapped) []byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	id := u.copyID()
	w.dropSecretID()
	if w.closed {
		_ = u.id.Close()
		return id
	}
	w.secretID = u
	return id
}

// copyID returns a copy of the secret ID, which the caller clears.
func (u *unwrapped) copyID() (id []byte) {
	u.id.With(func(b []byte) { id = append(make([]byte, 0, len(b)), b...) })
	return id
}

// dropSecretID closes the cached secret ID. The caller holds w.mu.
func (w *Wrapper) dropSecretID() {
	if w.secretID != nil {
		w.secretID.id.Close()
		w.secretID = nil
	}
}

const hintWrapped = "put a new wrapping token there: each start of kleidi serve takes one, and so does each command that runs without kleidi serve; if none of your people used the last token, somebody else has the secret ID, so destroy that first"

// unwrap unwraps a wrapping token. First it checks where the wrapped value was created: if
// somebody replaced the token on its way, that path differs.
func (s *session) unwrap(ctx context.Context, token []byte) (*seal.Secret, error) {
	s.Withhold(bytes.Clone(token))
	refuse := func(format string, args ...any) error {
		return s.config.errorf(seal.CauseCredentials, hintWrapped, "vault.auth.secretIDFile: "+format, args...)
	}
	body := object(field{"token", token, true})
	defer clear(body)
	var lookup struct {
		Data struct {
			Path string `json:"creation_path"`
		} `json:"data"`
	}
	if err := s.unwrapStep(ctx, "sys/wrapping/lookup", body, &lookup, refuse); err != nil {
		return nil, err
	}
	path := lookup.Data.Path
	if prefix := "auth/" + s.config.Auth.Mount + "/role/"; !strings.HasPrefix(path, prefix) || !strings.HasSuffix(path, "/secret-id") {
		return nil, refuse("the token wraps a value from %.100q, not a secret ID of %s", path, prefix)
	}
	var answer struct {
		Data struct {
			SecretID string `json:"secret_id"`
		} `json:"data"`
	}
	// The session has no token yet, so the wrapping token authenticates the request
	s.UseToken(string(token))
	defer s.ClearToken()
	if err := s.unwrapStep(ctx, "sys/wrapping/unwrap", []byte("{}"), &answer, refuse); err != nil {
		return nil, err
	}
	id := []byte(answer.Data.SecretID)
	if len(id) == 0 || bytes.ContainsFunc(id, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return nil, refuse("the token wraps no secret ID")
	}
	return s.config.Memory.Take(id)
}

func (s *session) unwrapStep(ctx context.Context, path string, body []byte, into any, refuse func(string, ...any) error) error {
	answer, err := s.Call(ctx, client.Request{Path: path, Body: body})
	if r, ok := errors.AsType[*client.Refusal](err); ok {
		if err := s.explainServer(r); err != nil {
			return err
		}
		return refuse("%s: %w: %s", path, ErrLogin, s.Quote(r))
	}
	if err != nil {
		return s.config.explainTransport(err)
	}
	if err := json.Unmarshal(answer, into); err != nil {
		return s.config.errorf(seal.CauseUnavailable, hintNotVault, "%s: %w", path, ErrNotVault)
	}
	return nil
}

// clientCertificate returns the certificate for the login. If its key fails, *failed is
// the error, because crypto/tls keeps only the text of it.
func (a Auth) clientCertificate(ctx context.Context, failed *error) (*tls.Certificate, error) {
	if a.ClientCertificate == nil {
		return a.readCertificate()
	}
	given, err := a.ClientCertificate(ctx)
	if err != nil {
		return nil, keyFailure(err)
	}
	certificate := *given
	signer, ok := certificate.PrivateKey.(crypto.Signer)
	if !ok {
		return nil, keyFailure(errors.New("its key can't sign"))
	}
	certificate.PrivateKey = keySigner{signer, failed}
	return &certificate, nil
}

func keyFailure(err error) error {
	if seal.CauseOf(err) != "" {
		return fmt.Errorf("vault: client certificate: %w", err)
	}
	return seal.Errorf(seal.CauseCredentials, "check vault.auth and the device that holds the key", "vault: client certificate: %w", err)
}

func (a Auth) readCertificate() (*tls.Certificate, error) {
	chain, err := credfile.Read("auth.certFile", a.CertFile, credfile.MaxPEM, credfile.Anyone)
	if err != nil {
		return nil, err
	}
	key, err := credfile.Read("auth.keyFile", a.KeyFile, credfile.MaxCredential, credfile.OwnerOnly)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	certificate, err := tls.X509KeyPair(chain, key)
	if err != nil {
		return nil, seal.Errorf(seal.CauseCredentials, "put a certificate and its own key there, PEM",
			"vault.auth.certFile %s, vault.auth.keyFile %s: they are not a pair", a.CertFile, a.KeyFile)
	}
	return &certificate, nil
}

// keySigner is a signer that records the failure of its key.
type keySigner struct {
	crypto.Signer
	failed *error
}

// Sign implements crypto.Signer.
func (k keySigner) Sign(rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	signature, err := k.Signer.Sign(rand, digest, opts)
	if err != nil {
		*k.failed = keyFailure(err)
	}
	return signature, err
}
