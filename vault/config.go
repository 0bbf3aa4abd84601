package vault

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/beezy-dev/kleidi/seal"
)

// Config says where the Transit key is and how to log in. Names in brackets are
// those of the configuration file.
type Config struct {
	// Address is https://HOST[:PORT] of the server (vault.address).
	Address string
	// Namespace of Vault Enterprise or OpenBao; empty is the root (vault.namespace).
	Namespace string
	// Mount is where the Transit engine is mounted; empty is "transit" (vault.mount).
	Mount string
	// Key is the name of the Transit key (vault.key).
	Key string
	// CAFile holds the certificates that may have issued the server's, PEM; empty
	// means the system's (vault.caFile).
	CAFile string
	// ServerName must be in the server's certificate; empty means the address's
	// host (vault.serverName).
	ServerName string
	// Timeout bounds one operation with its login and its retries, 1 s to 5 min;
	// 0 means 15 s (vault.timeout).
	Timeout time.Duration
	// Auth says how to log in (vault.auth).
	Auth Auth
	// Memory is where opened KEKs lie.
	Memory seal.Memory
}

// Auth is how to log in.
type Auth struct {
	// Method is one of the Method constants (vault.auth.method).
	Method Method
	// Mount is where the auth method is mounted; empty means the method's name (vault.auth.mount).
	Mount string
	// Role is the role to log in to: kubernetes and jwt need it, cert may name one
	// (vault.auth.role).
	Role string
	// TokenFile holds a token (vault.auth.tokenFile).
	TokenFile string
	// RoleID is AppRole's role ID, which is no secret (vault.auth.roleID).
	RoleID string
	// SecretIDFile holds AppRole's secret ID, or a token that wraps it (vault.auth.secretIDFile).
	SecretIDFile string
	// SecretIDWrapped says that SecretIDFile holds a response-wrapping token. It is
	// unwrapped once; the secret ID is kept in locked memory until Close
	// (vault.auth.secretIDWrapped).
	SecretIDWrapped bool
	// JWTFile holds a JSON web token: for kubernetes the projected service-account
	// token, whose default is ServiceAccountToken (vault.auth.jwtFile).
	JWTFile string
	// CertFile and KeyFile hold the client certificate and its key, PEM
	// (vault.auth.certFile, vault.auth.keyFile).
	CertFile, KeyFile string
	// ClientCertificate returns the client certificate instead, with a key that may
	// lie elsewhere, such as in this node's TPM: its PrivateKey is any crypto.Signer.
	// It is called once per operation.
	ClientCertificate func(ctx context.Context) (*tls.Certificate, error)
}

// Method is a way to log in.
type Method string

// The methods, as they stand in the configuration.
const (
	MethodToken      Method = "token"
	MethodAppRole    Method = "approle"
	MethodKubernetes Method = "kubernetes"
	MethodCert       Method = "cert"
	MethodJWT        Method = "jwt"
)

// ServiceAccountToken is where Kubernetes puts a pod's token.
const ServiceAccountToken = "/var/run/secrets/kubernetes.io/serviceaccount/token"

// Limits of Config.Timeout.
const (
	defaultTimeout = 15 * time.Second
	minTimeout     = time.Second
	maxTimeout     = 5 * time.Minute
)

// Names that can be part of a URL's path as they are, and of no other path.
var (
	keyName   = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$`)
	mountPath = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$`)
)

// maxPath bounds a mount path and a namespace, in characters.
const maxPath = 256

// complete fills in the defaults, drops slashes around paths, and reports all that
// is wrong at once.
func (c Config) complete() (Config, error) {
	c.Namespace = strings.Trim(c.Namespace, "/")
	c.Mount = orDefault(strings.Trim(c.Mount, "/"), "transit")
	c.Auth.Mount = orDefault(strings.Trim(c.Auth.Mount, "/"), string(c.Auth.Method))
	if c.Timeout == 0 {
		c.Timeout = defaultTimeout
	}
	if c.Auth.Method == MethodKubernetes {
		c.Auth.JWTFile = orDefault(c.Auth.JWTFile, ServiceAccountToken)
	}
	problems := append(c.problems(), c.Auth.problems()...)
	return c, errors.Join(problems...)
}

func orDefault(s, value string) string {
	if s == "" {
		return value
	}
	return s
}

func (c Config) problems() (all []error) {
	add := func(format string, args ...any) { all = append(all, fmt.Errorf(format, args...)) }
	if err := checkAddress(c.Address); err != nil {
		add("vault.address: %w; set it to https://HOST:PORT of Vault or OpenBao", err)
	}
	for setting, path := range map[string]string{"vault.namespace": c.Namespace, "vault.mount": c.Mount, "vault.auth.mount": c.Auth.Mount} {
		if path != "" && (len(path) > maxPath || !mountPath.MatchString(path)) {
			add("%s: %.100q is no path of letters, digits, dots, dashes and underscores; set the one that the server lists", setting, path)
		}
	}
	if !keyName.MatchString(c.Key) {
		add("vault.key: %.100q is no name of a Transit key; set the name that was given to vault write -f transit/keys/NAME", c.Key)
	}
	if c.CAFile != "" && !filepath.IsAbs(c.CAFile) {
		add("vault.caFile: %.100q is no absolute path; write the whole path", c.CAFile)
	}
	if c.Timeout < minTimeout || c.Timeout > maxTimeout {
		add("vault.timeout: %s; set %s to %s", c.Timeout, minTimeout, maxTimeout)
	}
	return all
}

// checkAddress allows https alone: what would go over anything else is the KEK. No
// credential, path or query may hide in it.
func checkAddress(address string) error {
	u, err := url.Parse(address)
	switch {
	case address == "":
		return errors.New("it is missing")
	case err != nil:
		return errors.New("it is no URL") // err quotes it
	case u.Scheme != "https":
		return fmt.Errorf("its scheme is %.20q, only https is allowed", u.Scheme)
	case u.User != nil:
		return errors.New("it holds a user or a password")
	case u.Hostname() == "" || u.Opaque != "":
		return errors.New("it names no host")
	case strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "":
		return errors.New("there is more behind its host and port")
	}
	return nil
}

// needs lists what a method needs, by setting, and what it may have.
func (a Auth) needs() (needed, allowed map[string]string, ok bool) {
	switch a.Method {
	case MethodToken:
		return map[string]string{"tokenFile": a.TokenFile}, nil, true
	case MethodAppRole:
		return map[string]string{"roleID": a.RoleID, "secretIDFile": a.SecretIDFile}, nil, true
	case MethodKubernetes, MethodJWT:
		return map[string]string{"role": a.Role, "jwtFile": a.JWTFile}, nil, true
	case MethodCert:
		if a.ClientCertificate != nil {
			return nil, map[string]string{"role": a.Role}, true
		}
		return map[string]string{"certFile": a.CertFile, "keyFile": a.KeyFile}, map[string]string{"role": a.Role}, true
	}
	return nil, nil, false
}

func (a Auth) settings() map[string]string {
	return map[string]string{
		"role": a.Role, "tokenFile": a.TokenFile, "roleID": a.RoleID, "secretIDFile": a.SecretIDFile,
		"jwtFile": a.JWTFile, "certFile": a.CertFile, "keyFile": a.KeyFile,
	}
}

func (a Auth) problems() (all []error) {
	needed, allowed, ok := a.needs()
	if !ok {
		return []error{fmt.Errorf("vault.auth.method: %.50q; set token, approle, kubernetes, cert or jwt", a.Method)}
	}
	for setting, value := range a.settings() {
		_, need := needed[setting]
		_, may := allowed[setting]
		switch {
		case need && value == "":
			all = append(all, fmt.Errorf("vault.auth.%s: it is missing; the method %s needs it", setting, a.Method))
		case !need && !may && value != "":
			all = append(all, fmt.Errorf("vault.auth.%s: the method %s doesn't use it; remove it", setting, a.Method))
		case strings.HasSuffix(setting, "File") && value != "" && !filepath.IsAbs(value):
			all = append(all, fmt.Errorf("vault.auth.%s: %.100q is no absolute path; write the whole path", setting, value))
		}
	}
	if a.SecretIDWrapped && a.Method != MethodAppRole {
		all = append(all, fmt.Errorf("vault.auth.secretIDWrapped: the method %s doesn't use it; remove it", a.Method))
	}
	return all
}
