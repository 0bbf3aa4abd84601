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
)

// login gives the session a token.
func (w *Wrapper) login(ctx context.Context, s *session) error {
	a := w.config.Auth
	switch a.Method {
	case MethodToken:
		return withCredential("auth.tokenFile", a.TokenFile, ownerOnly, func(token []byte) error {
			s.useToken(string(token))
			return nil
		})
	case MethodAppRole:
		return w.withSecretID(ctx, s, func(id []byte) error {
			return s.loginWith(ctx, field{"role_id", []byte(a.RoleID), false}, field{"secret_id", id, true})
		})
	case MethodKubernetes:
		return s.loginWithJWT(ctx, anybody)
	case MethodJWT:
		return s.loginWithJWT(ctx, ownerOnly)
	}
	if a.Role == "" {
		return s.loginWith(ctx)
	}
	return s.loginWith(ctx, field{"name", []byte(a.Role), false})
}

func (s *session) loginWithJWT(ctx context.Context, may who) error {
	return withCredential("auth.jwtFile", s.config.Auth.JWTFile, may, func(jwt []byte) error {
		return s.loginWith(ctx, field{"role", []byte(s.config.Auth.Role), false}, field{"jwt", jwt, true})
	})
}

// field is a member of a JSON object whose value is a string.
type field struct {
	name   string
	value  []byte // printable
	secret bool
}

// object encodes fields into one buffer, which the caller clears.
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
			s.secrets = append(s.secrets, bytes.Clone(f.value))
		}
	}
	r := request{path: "auth/" + s.config.Auth.Mount + "/login", body: body}
	answer, err := s.call(ctx, r)
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
		return s.config.errorf(seal.CauseUnavailable, hintNotVault, "%s: %w: it holds no token", r.path, ErrNotVault)
	}
	s.useToken(token)
	s.revoke = true
	return nil
}

// withSecretID calls use with AppRole's secret ID.
func (w *Wrapper) withSecretID(ctx context.Context, s *session, use func(id []byte) error) error {
	a := w.config.Auth
	return withCredential("auth.secretIDFile", a.SecretIDFile, ownerOnly, func(b []byte) error {
		if !a.SecretIDWrapped {
			return use(b)
		}
		return w.withUnwrapped(ctx, s, b, use)
	})
}

// unwrapped is a secret ID that came out of a response-wrapping token, which opens
// only once.
type unwrapped struct {
	token [sha256.Size]byte // digest of the token
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

// unwrapOnce unwraps a token that was not unwrapped before, and returns the secret
// ID, which the caller clears. Callers come one by one, since the second unwrapping
// of a token fails; who waits for another one waits no longer than ctx.
func (w *Wrapper) unwrapOnce(ctx context.Context, s *session, token []byte) ([]byte, error) {
	digest := sha256.Sum256(token)
	if id := w.kept(digest); id != nil {
		return id, nil
	}
	select {
	case w.unwrapping <- struct{}{}:
		defer func() { <-w.unwrapping }()
	case <-ctx.Done():
		return nil, w.config.explainTransport(ctx.Err())
	}
	if id := w.kept(digest); id != nil {
		return id, nil
	}
	// Who asked may have gone: what the server gives out once must be kept all the same.
	deadline, _ := ctx.Deadline() // see in
	ctx, cancel := context.WithDeadline(context.WithoutCancel(ctx), deadline)
	defer cancel()
	secret, err := s.unwrap(ctx, token)
	if err != nil {
		return nil, err
	}
	return w.keep(&unwrapped{digest, secret}), nil
}

// kept returns a copy of the secret ID that came out of a token, or nil.
func (w *Wrapper) kept(token [sha256.Size]byte) []byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.secretID == nil || w.secretID.token != token {
		return nil
	}
	return w.secretID.copied()
}

// keep keeps a secret ID until Close, and returns a copy.
func (w *Wrapper) keep(u *unwrapped) []byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	id := u.copied()
	w.forget()
	if w.closed {
		_ = u.id.Close()
		return id
	}
	w.secretID = u
	return id
}

func (u *unwrapped) copied() (id []byte) {
	u.id.With(func(b []byte) { id = append(make([]byte, 0, len(b)), b...) })
	return id
}

// forget closes the unwrapped secret ID; w.mu is held.
func (w *Wrapper) forget() {
	if w.secretID != nil {
		w.secretID.id.Close()
		w.secretID = nil
	}
}

const hintWrapped = "put a new wrapping token there: each start of kleidi serve takes one, and so does each command that runs without it; if nobody of yours used the last one, somebody else has the secret ID: destroy it first"

// unwrap asks first what the token wraps: one that was replaced on its way wraps
// something that was made elsewhere.
func (s *session) unwrap(ctx context.Context, token []byte) (*seal.Secret, error) {
	s.secrets = append(s.secrets, bytes.Clone(token))
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
		return nil, refuse("the token wraps what was made at %.100q, not a secret ID of %s", path, prefix)
	}
	var answer struct {
		Data struct {
			SecretID string `json:"secret_id"`
		} `json:"data"`
	}
	// Without a token of our own the wrapping token is the one that asks
	s.useToken(string(token))
	defer s.client.ClearToken()
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
	answer, err := s.call(ctx, request{path: path, body: body})
	if r, ok := errors.AsType[*refusal](err); ok {
		if err := s.explainServer(r); err != nil {
			return err
		}
		return refuse("%s: %w: %s", path, ErrLogin, s.quote(r))
	}
	if err != nil {
		return s.config.explainTransport(err)
	}
	if err := json.Unmarshal(answer, into); err != nil {
		return s.config.errorf(seal.CauseUnavailable, hintNotVault, "%s: %w", path, ErrNotVault)
	}
	return nil
}

// clientCertificate returns the certificate to log in with. Where its key fails,
// failed is told: crypto/tls keeps only the text of that.
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
	chain, err := readFile("auth.certFile", a.CertFile, maxPEM, anybody)
	if err != nil {
		return nil, err
	}
	key, err := readFile("auth.keyFile", a.KeyFile, maxCredential, ownerOnly)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	certificate, err := tls.X509KeyPair(chain, key)
	if err != nil {
		return nil, seal.Errorf(seal.CauseCredentials, "put a certificate and its own key there, PEM",
			"vault.auth.certFile %s, vault.auth.keyFile %s: they are no pair", a.CertFile, a.KeyFile)
	}
	return &certificate, nil
}

// keySigner keeps why its key failed.
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
