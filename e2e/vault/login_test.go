package vault

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/tls"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/vault"
)

// TestRefusedLogins: for each method, the message about wrong credentials. The same
// wrapper works once they are right.
func TestRefusedLogins(t *testing.T) {
	for _, row := range []struct {
		name  string
		auth  func(*server) vault.Auth
		spoil func(s *server)
		mend  func(s *server)
		says  []string
	}{
		{"approle, another secret ID", appRoleAuth,
			func(s *server) { s.write("secret-id", []byte("00000000-0000-0000-0000-000000000000")) },
			func(s *server) {
				s.write("secret-id", []byte(field(s.t, s.must("auth/approle/role/kleidi/secret-id", nil), "secret_id")))
			},
			[]string{"auth/approle/login", "it refuses the login", "put a new secret ID of it into vault.auth.secretIDFile"}},
		{"approle, role gone", appRoleAuth,
			func(s *server) { s.remove("auth/approle/role/kleidi") },
			func(s *server) {
				s.must("auth/approle/role/kleidi", map[string]any{"token_policies": "kleidi"})
				s.must("auth/approle/role/kleidi/role-id", map[string]any{"role_id": s.roleID})
				s.write("secret-id", []byte(field(s.t, s.must("auth/approle/role/kleidi/secret-id", nil), "secret_id")))
			},
			[]string{"it refuses the login", "put a new secret ID of it into vault.auth.secretIDFile"}},
		{"cert, another name", certAuth,
			func(s *server) { s.ca.issue(s.t, s.path("client"), "node-2") },
			func(s *server) { s.ca.issue(s.t, s.path("client"), "node-1") },
			[]string{"auth/cert/login", "it refuses the login", "check that the role admits this client certificate"}},
		{"cert, another CA", certAuth,
			func(s *server) { newAuthority(s.t).issue(s.t, s.path("client"), "node-1") },
			func(s *server) { s.ca.issue(s.t, s.path("client"), "node-1") },
			[]string{"it refuses the login", "check that the role admits this client certificate"}},
		{"cert, key of another", certAuth,
			func(s *server) {
				s.ca.issue(s.t, s.path("other"), "node-1")
				s.copy("other.key", "client.key")
			},
			func(s *server) { s.ca.issue(s.t, s.path("client"), "node-1") },
			[]string{"vault.auth.certFile", "they are not a pair"}},
		{"jwt, another key", jwtAuth,
			func(s *server) { s.write("jwt", []byte(newJWT(s.t, newKey(s.t), "node-1"))) },
			func(s *server) { s.write("jwt", []byte(newJWT(s.t, s.jwtKey, "node-1"))) },
			[]string{"auth/jwt/login", "it refuses the login", "issuer, audience and subject"}},
		{"jwt, another subject", jwtAuth,
			func(s *server) { s.write("jwt", []byte(newJWT(s.t, s.jwtKey, "node-2"))) },
			func(s *server) { s.write("jwt", []byte(newJWT(s.t, s.jwtKey, "node-1"))) },
			[]string{"it refuses the login", "issuer, audience and subject"}},
		{"auth method gone", jwtAuth,
			func(s *server) { s.remove("sys/auth/jwt") },
			func(s *server) { jwtAuth(s) },
			[]string{"auth/jwt/login", "it refuses the login", "vault.auth.mount is right"}},
	} {
		t.Run(row.name, func(t *testing.T) {
			s := newServer(t)
			c := s.config()
			c.Auth = row.auth(s)
			w, kek := s.wrapper(c), newKEK(t)
			slot := wrap(t, w, kek)
			row.spoil(s)
			_, err := w.Unwrap(t.Context(), slot)
			checkError(t, "Unwrap", err, seal.CauseCredentials, nil, row.says...)
			row.mend(s)
			checkOpens(t, w, slot, kek)
		})
	}
}

// TestKubernetesRefuses tries the wrong service account, and a token for another
// audience.
func TestKubernetesRefuses(t *testing.T) {
	s := newServer(t)
	c := s.config()
	c.Auth = kubernetesAuth(s)
	w, kek := s.wrapper(c), newKEK(t)
	slot := wrap(t, w, kek)
	for _, row := range []struct{ account, audience string }{{"vault-reviewer", "vault"}, {"kleidi", "elsewhere"}} {
		s.write("projected", []byte(s.apiserver.serviceToken(t, row.account, row.audience)))
		_, err := w.Unwrap(t.Context(), slot)
		checkError(t, row.account+" for "+row.audience, err, seal.CauseCredentials, vault.ErrLogin,
			"auth/kubernetes/login", "admits this service account, its namespace and the token's audience")
	}
	s.write("projected", []byte(s.apiserver.serviceToken(t, "kleidi", "vault")))
	checkOpens(t, w, slot, kek)
}

// TestWrappedSecretID: a wrapping token opens once, and only for its declared content. A
// new token in the file is used.
func TestWrappedSecretID(t *testing.T) {
	s := newServer(t)
	c := s.config()
	c.Auth = wrappedAuth(s)
	w, kek := s.wrapper(c), newKEK(t)
	slot := wrap(t, w, kek)
	checkOpens(t, w, slot, kek)

	_, err := s.wrapper(c).Unwrap(t.Context(), slot)
	checkError(t, "the same token again", err, seal.CauseCredentials, vault.ErrLogin, "vault.auth.secretIDFile", "somebody else has the secret ID")
	s.write("secret-id", wrappedSecretID(s))
	checkOpens(t, w, slot, kek)

	wrapped := s.client(s.root.Token())
	wrapped.SetWrappingLookupFunc(func(string, string) string { return "5m" })
	secret, err := wrapped.Logical().WriteWithContext(t.Context(), "sys/wrapping/wrap", map[string]any{"secret_id": "mine"})
	if err != nil {
		t.Fatal(err)
	}
	s.write("secret-id", []byte(secret.WrapInfo.Token))
	_, err = w.Unwrap(t.Context(), slot)
	checkError(t, "a token that wraps something else", err, seal.CauseCredentials, nil, `wraps a value from "sys/wrapping/wrap", not a secret ID`)
}

// failing is a key whose device is missing.
type failing struct{ crypto.Signer }

func (failing) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) {
	return nil, errors.New("TPM2_Sign: the device is gone")
}

// TestKeyElsewhereFails: the operator sees the message of the key's device.
func TestKeyElsewhereFails(t *testing.T) {
	s := newServer(t)
	c := s.config()
	file := certAuth(s)
	pair, err := tls.LoadX509KeyPair(file.CertFile, file.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	good := pair.PrivateKey.(*ecdsa.PrivateKey)
	var refuses error
	c.Auth = vault.Auth{Method: vault.MethodCert, ClientCertificate: func(context.Context) (*tls.Certificate, error) { return &pair, refuses }}
	w, kek := s.wrapper(c), newKEK(t)
	slot := wrap(t, w, kek)

	pair.PrivateKey = failing{good}
	_, err = w.Unwrap(t.Context(), slot)
	checkError(t, "the key fails", err, seal.CauseCredentials, nil, "TPM2_Sign: the device is gone")
	if strings.Contains(err.Error(), "listener") {
		t.Errorf("the server is blamed: %v", err)
	}
	refuses = seal.Errorf(seal.CauseLockout, "wait", "the TPM is locked out")
	_, err = w.Unwrap(t.Context(), slot)
	checkError(t, "there is no certificate", err, seal.CauseLockout, refuses, "the TPM is locked out", "wait")
	pair.PrivateKey, refuses = good, nil
	checkOpens(t, w, slot, kek)
}
