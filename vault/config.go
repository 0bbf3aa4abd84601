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

// Config names the Transit key and says how to log in. The names in parentheses are those
// of the configuration file.
type Config struct {
	// Address is the address of the server, https://HOST[:PORT] (vault.address).
	Address string
	// Namespace is a namespace of Vault Enterprise or OpenBao. If it is empty, the
	// namespace is the root (vault.namespace).
	Namespace string
	// Mount is the path of the Transit engine. If it is empty, the path is "transit"
	// (vault.mount).
	Mount string
	// Key is the name of the Transit key (vault.key).
	Key string
	// CAFile is a PEM file with the CA certificates for the server's certificate. If it
	// is empty, those of the system are used (vault.caFile).
	CAFile string
	// ServerName is the name that the server's certificate must have. If it is empty,
	// the name is the host of the address (vault.serverName).
	ServerName string
	// Timeout is the timeout of an operation with its login and its retries, from 1 s to
	// 5 min. 0 means 15 s (vault.timeout).
	Timeout time.Duration
	// Auth says how to log in (vault.auth).
	Auth Auth
	// Memory allocates the memory of unwrapped KEKs.
	Memory seal.Memory
}

// Auth says how to log in.
type Auth struct {
	// Method is one of the Method constants (vault.auth.method).
	Method Method
	// Mount is the path of the auth method. If it is empty, the path is the name of the
	// method (vault.auth.mount).
	Mount string
	// Role is the role of the login. The methods kubernetes and jwt need it; for cert it
	// is optional (vault.auth.role).
	Role string
	// TokenFile is a file with a token (vault.auth.tokenFile).
	TokenFile string
	// RoleID is AppRole's role ID, which is not secret (vault.auth.roleID).
	RoleID string
	// SecretIDFile is a file with AppRole's secret ID, or with a token that wraps it
	// (vault.auth.secretIDFile).
	SecretIDFile string
	// SecretIDWrapped says that SecretIDFile has a response-wrapping token. The token is
	// unwrapped once, and the secret ID stays in locked memory until Close
	// (vault.auth.secretIDWrapped).
	SecretIDWrapped bool
	// JWTFile is a file with a JSON web token. For the method kubernetes it is the
	// projected service-account token, with the default ServiceAccountToken
	// (vault.auth.jwtFile).
	JWTFile string
	// CertFile and KeyFile are PEM files with the client certificate and its key
	// (vault.auth.certFile, vault.auth.keyFile).
	CertFile, KeyFile string
	// ClientCertificate, if set, returns the client certificate. Its PrivateKey is any
	// crypto.Signer, so the key may be in this node's TPM. ClientCertificate is called
	// once for each operation.
	ClientCertificate func(ctx context.Context) (*tls.Certificate, error)
}

// Method is a way to log in.
type Method string

// The methods, under their names in the configuration.
const (
	MethodToken      Method = "token"
	MethodAppRole    Method = "approle"
	MethodKubernetes Method = "kubernetes"
	MethodCert       Method = "cert"
	MethodJWT        Method = "jwt"
)

// ServiceAccountToken is the file in which Kubernetes puts the token of a pod.
const ServiceAccountToken = "/var/run/secrets/kubernetes.io/serviceaccount/token"

// Limits of Config.Timeout.
const (
	defaultTimeout = 15 * time.Second
	minTimeout     = time.Second
	maxTimeout     = 5 * time.Minute
)

// Names that need no escaping in the path of a URL, and that can't lead to another path.
var (
	keyName   = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$`)
	mountPath = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*$`)
)

// maxPath is the maximum size of a mount path and of a namespace in characters.
const maxPath = 256

// complete fills in the defaults and removes slashes around paths. Its error names every
// setting that is wrong.
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
			add("%s: %.100q is not a path of letters, digits, dots, dashes and underscores; set the path that the server lists", setting, path)
		}
	}
	if !keyName.MatchString(c.Key) {
		add("vault.key: %.100q is not the name of a Transit key; set NAME of vault write -f transit/keys/NAME", c.Key)
	}
	if c.CAFile != "" && !filepath.IsAbs(c.CAFile) {
		add("vault.caFile: %.100q is not an absolute path; write the whole path", c.CAFile)
	}
	if c.Timeout < minTimeout || c.Timeout > maxTimeout {
		add("vault.timeout: %s; set %s to %s", c.Timeout, minTimeout, maxTimeout)
	}
	return all
}

// checkAddress allows https only, because the KEK is sent to that address. It refuses
// credentials, paths and queries in the address.
func checkAddress(address string) error {
	u, err := url.Parse(address)
	switch {
	case address == "":
		return errors.New("it is missing")
	case err != nil:
		return errors.New("it is not a URL") // err would quote it
	case u.Scheme != "https":
		return fmt.Errorf("its scheme is %.20q, only https is allowed", u.Scheme)
	case u.User != nil:
		return errors.New("it holds a user or a password")
	case u.Hostname() == "" || u.Opaque != "":
		return errors.New("it names no host")
	case strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "":
		return errors.New("it has more than a host and a port")
	}
	return nil
}

// needs returns the settings that the method needs, and further settings that it allows.
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
			all = append(all, fmt.Errorf("vault.auth.%s: %.100q is not an absolute path; write the whole path", setting, value))
		}
	}
	if a.SecretIDWrapped && a.Method != MethodAppRole {
		all = append(all, fmt.Errorf("vault.auth.secretIDWrapped: the method %s doesn't use it; remove it", a.Method))
	}
	return all
}
