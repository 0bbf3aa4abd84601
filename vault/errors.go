package vault

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"syscall"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/vault/internal/client"
	"github.com/beezy-dev/kleidi/vault/internal/transitslot"
)

// Refusals of the server, for errors.Is. Each comes in a [*seal.Error] with its cause and a
// hint.
var (
	// ErrSealed says that the server is sealed, so that it has none of its keys.
	ErrSealed = errors.New("it is sealed")
	// ErrStandby says that the server is a standby server and can't serve the request.
	ErrStandby = errors.New("it is a standby server")
	// ErrRateLimited says that a quota of the server is used up.
	ErrRateLimited = errors.New("it limits the rate of requests")
	// ErrLogin says that the auth method refuses the credentials.
	ErrLogin = errors.New("it refuses the login")
	// ErrToken says that the token is expired, revoked or malformed.
	ErrToken = errors.New("the token is expired, revoked or of another server")
	// ErrDenied says that the token is valid but lacks a capability.
	ErrDenied = errors.New("permission denied")
	// ErrKeyMissing says that there is no Transit key of this name.
	ErrKeyMissing = errors.New("there is no such Transit key")
	// ErrMountMissing says that nothing is mounted at this path of the namespace.
	ErrMountMissing = errors.New("nothing is mounted there")
	// ErrTooOld says that the key's min_decryption_version is above the slot's version.
	ErrTooOld = errors.New("the key's min_decryption_version is above the slot's version")
	// ErrNotVault says that a program other than Vault has answered.
	ErrNotVault = errors.New("the answer is not Vault's")
)

const (
	hintOtherKey   = "if the Transit key was deleted and made again, run kleidi slot rewrap NAME --new-key, or kleidi slot remove NAME and kleidi slot add vault; else " + transitslot.HintRestore
	hintNotVault   = "set vault.address to Vault or OpenBao itself, not to a proxy or another service"
	hintKeyMissing = "correct vault.key, or restore the key from a backup of the server"
	hintPaths      = "correct vault.mount or vault.namespace, or enable the engine there"
)

// Texts of Vault and OpenBao by which answers with the same status differ. Whole texts are
// compared, because other texts may quote parts of them.
const (
	textInvalidToken = "invalid token"
	textDenied       = "permission denied"
	textKeyMissing   = "encryption key not found"
	textTooOld       = "ciphertext or signature version is disallowed by policy (too old)"
)

// Statuses of sys/health and of performance standbys for which net/http has no name.
const (
	statusRecoverySecondary  = 472
	statusPerformanceStandby = 473
)

// explain turns an error of call into a [*seal.Error].
func (s *session) explain(ctx context.Context, r client.Request, err error) error {
	refused, ok := errors.AsType[*client.Refusal](err)
	if !ok {
		return s.config.explainTransport(err)
	}
	if err := s.explainServer(refused); err != nil {
		return err
	}
	switch {
	case refused.Status == http.StatusForbidden:
		return s.explainForbidden(ctx, r, refused)
	case refused.HasLine(textKeyMissing):
		return s.config.errorf(seal.CauseKeyMissing, hintKeyMissing, "%s: %w", r.Path, ErrKeyMissing)
	case refused.Status == http.StatusNotFound:
		return s.config.errorf(seal.CauseUnavailable, hintPaths, "%s: %w", r.Path, ErrMountMissing)
	}
	return s.config.errorf(seal.CauseUnavailable, "see the server's log for the reason, and check that the Transit key can encrypt without a context",
		"%s: %s", r.Path, s.Quote(refused))
}

// explainServer explains a refusal that any request may get. It returns nil for others.
func (s *session) explainServer(r *client.Refusal) error {
	switch {
	case r.Sealed():
		return s.config.errorf(seal.CauseUnavailable, "unseal it; kleidi then opens by itself", "%w", ErrSealed)
	case r.Status == http.StatusTooManyRequests:
		return s.config.errorf(seal.CauseUnavailable, "wait, or raise the quota of this path (sys/quotas/rate-limit)",
			"%w: %s", ErrRateLimited, s.Quote(r))
	case r.Status == statusRecoverySecondary, r.Status == statusPerformanceStandby:
		return s.config.errorf(seal.CauseUnavailable, "set vault.address to the active server, or to a load balancer that knows it",
			"%w (status %d)", ErrStandby, r.Status)
	case r.Status == http.StatusRequestEntityTooLarge:
		return s.config.errorf(seal.CauseUnavailable, "raise max_request_size of the server's listener", "it refuses the request as too large")
	case r.Status >= http.StatusInternalServerError:
		return s.config.errorf(seal.CauseUnavailable, "see the server's log, or run the command again", "it failed: %s", s.Quote(r))
	}
	return nil
}

// explainForbidden asks the server which capability is missing. A valid token may ask for
// its own capabilities.
func (s *session) explainForbidden(ctx context.Context, r client.Request, refused *client.Refusal) error {
	if refused.HasLine(textInvalidToken) {
		return s.config.errorf(seal.CauseCredentials, s.config.Auth.renewHint(), "%s: %w", r.Path, ErrToken)
	}
	grant := fmt.Sprintf("grant it the capability %q on the path %q", r.Capability, r.Path)
	capabilities, err := s.capabilities(ctx, r.Path)
	switch {
	case forbidden(err):
		return s.config.errorf(seal.CauseCredentials, grant+`, and "update" on "sys/capabilities-self"; or renew it, if it has expired`,
			"%s: %w", r.Path, ErrDenied)
	case err != nil, !slices.Contains(capabilities, r.Capability):
		return s.config.errorf(seal.CauseCredentials, grant, "%s: %w", r.Path, ErrDenied)
	case r.Path == s.config.Mount+"/encrypt/"+s.config.Key:
		// if the key doesn't exist, Vault demands the capability create, not update
		return s.config.errorf(seal.CauseKeyMissing, hintKeyMissing, "%s: %w", r.Path, ErrKeyMissing)
	}
	return s.config.errorf(seal.CauseCredentials, "see the server's audit log; the token has the capability, so another rule (MFA, control group) forbids it",
		"%s: %w", r.Path, ErrDenied)
}

func forbidden(err error) bool {
	r, ok := errors.AsType[*client.Refusal](err)
	return ok && r.Status == http.StatusForbidden
}

// explainLogin turns an error of a login into a [*seal.Error].
func (s *session) explainLogin(r client.Request, err error) error {
	refused, ok := errors.AsType[*client.Refusal](err)
	if !ok {
		return s.config.explainTransport(err)
	}
	if err := s.explainServer(refused); err != nil {
		return err
	}
	if refused.Status == http.StatusNotFound {
		return s.config.errorf(seal.CauseCredentials, "correct vault.auth.mount or vault.namespace, or enable the auth method there",
			"%s: %w", r.Path, ErrMountMissing)
	}
	hint := s.config.Auth.renewHint()
	if refused.HasLine(textDenied) {
		hint += ", and that vault.auth.mount is right" // Vault answers the same for a missing mount
	}
	return s.config.errorf(seal.CauseCredentials, hint, "%s: %w: %s", r.Path, ErrLogin, s.Quote(refused))
}

// renewHint returns the remedy for refused credentials.
func (a Auth) renewHint() string {
	switch a.Method {
	case MethodToken:
		return "check that the token is valid, or put another into vault.auth.tokenFile"
	case MethodAppRole:
		if a.SecretIDWrapped {
			return "check that vault.auth.roleID is the role's, or put a new wrapping token for a secret ID of it into vault.auth.secretIDFile"
		}
		return "check that vault.auth.roleID is the role's, or put a new secret ID of it into vault.auth.secretIDFile"
	case MethodKubernetes:
		return "check that vault.auth.role admits this service account, its namespace and the token's audience"
	case MethodCert:
		return "check that the role admits this client certificate, and that it has not expired"
	}
	return "check that vault.auth.role admits this token's issuer, audience and subject, and that it has not expired"
}

// errorf returns an error whose text begins with the address of the server.
func (c Config) errorf(cause seal.Cause, hint, format string, args ...any) error {
	return seal.Errorf(cause, hint, "vault: "+c.Address+": "+format, args...)
}

// explainTransport turns a failure of the transport into a [*seal.Error].
func (c Config) explainTransport(err error) error {
	if e, ok := errors.AsType[*seal.Error](err); ok {
		return e // a failure of the client certificate's key
	}
	if e, ok := errors.AsType[*url.Error](err); ok {
		err = e.Err // e would name the URL again
	}
	switch {
	case errors.Is(err, context.Canceled):
		return c.errorf(seal.CauseUnavailable, "run the command again", "%w", err)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return c.errorf(seal.CauseUnavailable, "check that it is up and reachable from here, or raise vault.timeout",
			"no answer within %s: %w", c.Timeout, context.DeadlineExceeded)
	case errors.Is(err, client.ErrOversized), errors.Is(err, client.ErrHeaders):
		return c.errorf(seal.CauseUnavailable, hintNotVault, "%w: %w", ErrNotVault, err)
	case errors.Is(err, client.ErrRedirect), errors.Is(err, client.ErrRedirects):
		return c.errorf(seal.CauseUnavailable, "set vault.address to the active server, or correct api_addr of the servers", "%w: %w", ErrStandby, err)
	}
	if e, ok := errors.AsType[*client.NotVault](err); ok {
		return c.errorf(seal.CauseUnavailable, hintNotVault, "%w: %w", ErrNotVault, e)
	}
	if err := c.explainTLS(err); err != nil {
		return err
	}
	return c.explainNetwork(err)
}

// explainTLS explains an error of TLS. It returns nil for others.
func (c Config) explainTLS(err error) error {
	const cause = seal.CauseUnavailable
	if e, ok := errors.AsType[x509.HostnameError](err); ok {
		return c.errorf(cause, "set vault.serverName, or vault.address, to a name that is in the certificate",
			"its certificate is not for %.100q: %w", e.Host, shortened{e})
	}
	if e, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
		return c.errorf(cause, "set vault.caFile to the certificate of the CA that issued the server's", "%w", shortened{e})
	}
	if e, ok := errors.AsType[x509.CertificateInvalidError](err); ok {
		return c.errorf(cause, "renew the server's certificate, and check this machine's clock", "%w", shortened{e})
	}
	if _, ok := errors.AsType[tls.RecordHeaderError](err); ok {
		return c.errorf(cause, "give the server's listener a certificate, or correct the port in vault.address", "it does not speak TLS")
	}
	if e, ok := errors.AsType[*net.OpError](err); ok && e.Op == "remote error" {
		if c.Auth.Method == MethodCert {
			return c.errorf(seal.CauseCredentials, c.Auth.renewHint(), "it refuses the TLS connection: %w", e.Err)
		}
		return c.errorf(cause, "check the TLS settings of the server's listener", "it refuses the TLS connection: %w", e.Err)
	}
	if e, ok := errors.AsType[*client.HandshakeError](err); ok && !client.BrokeOff(err) {
		return c.errorf(cause, "check the TLS settings of the server's listener", "TLS: %w", shortened{e.Err})
	}
	return nil
}

func (c Config) explainNetwork(err error) error {
	const cause = seal.CauseUnavailable
	var dns *net.DNSError
	switch {
	case errors.As(err, &dns):
		return c.errorf(cause, "correct the host in vault.address, or this machine's name service", "%w", shortened{err})
	case errors.Is(err, syscall.ECONNREFUSED):
		return c.errorf(cause, "start the server, or correct vault.address", "%w", syscall.ECONNREFUSED)
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return c.errorf(cause, "check the network and the firewalls between this machine and the server", "%w", shortened{err})
	}
	if client.BrokeOff(err) {
		return c.errorf(cause, "check that it is up, and that nothing in between ends connections", "the connection breaks off: %w", shortened{err})
	}
	return c.errorf(cause, "check that it is up, and run the command again", "%w", shortened{err})
}

// shortened is an error with a shortened text.
type shortened struct{ err error }

func (s shortened) Error() string {
	text := s.err.Error()
	if len(text) > client.MaxQuoted {
		text = text[:client.MaxQuoted] + "…"
	}
	return text
}

func (s shortened) Unwrap() error { return s.err }
