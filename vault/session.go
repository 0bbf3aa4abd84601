package vault

import (
	"context"
	"crypto/tls"
	"time"

	"github.com/beezy-dev/kleidi/vault/internal/client"
	"github.com/beezy-dev/kleidi/vault/internal/credfile"
)

// revokeTimeout is the timeout of the revocation of a token.
const revokeTimeout = 2 * time.Second

// session is the connection of one operation, and the token that is revoked at its end.
// One goroutine uses it.
type session struct {
	*client.Client
	config Config
	revoke bool // whether the session revokes its token at the end
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
	defer s.Close()
	if err := w.login(ctx, s); err != nil {
		return err
	}
	defer s.revokeToken(ctx)
	return f(ctx, s)
}

func (w *Wrapper) newSession(ctx context.Context) (*session, error) {
	pool, err := credfile.Roots(w.config.CAFile)
	if err != nil {
		return nil, err
	}
	var keyFailed error
	config := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: pool, ServerName: w.config.ServerName}
	if w.config.Auth.Method == MethodCert {
		certificate, err := w.config.Auth.clientCertificate(ctx, &keyFailed)
		if err != nil {
			return nil, err
		}
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return certificate, nil }
	}
	c, err := client.New(w.config.Address, w.config.Namespace, config, &keyFailed)
	if err != nil {
		return nil, err
	}
	return &session{config: w.config, Client: c}, nil
}

// revokeToken revokes the token, even if the operation was cancelled. If the server does
// not answer, the token expires by its TTL.
func (s *session) revokeToken(ctx context.Context) {
	if !s.revoke {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), revokeTimeout)
	defer cancel()
	_, _ = s.Send(ctx, client.Request{Path: "auth/token/revoke-self", Body: []byte("{}")})
}
