package vault

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/sealtest"
	"github.com/beezy-dev/kleidi/vault"
)

// methods are the auth methods, each set up as docs/vault.md says.
var methods = map[string]func(s *server) vault.Auth{
	"token":                tokenAuth,
	"approle":              appRoleAuth,
	"approle wrapped":      wrappedAuth,
	"cert":                 certAuth,
	"cert, key in the TPM": tpmAuth,
	"jwt":                  jwtAuth,
	"kubernetes":           kubernetesAuth,
}

// TestConformance runs the wrappers' common suite with each auth method.
func TestConformance(t *testing.T) {
	for name, auth := range methods {
		t.Run(name, func(t *testing.T) {
			s := newServer(t)
			s.must("transit/keys/other", map[string]any{})
			c := s.config()
			c.Auth = auth(s)
			other := c
			other.Key = "other"
			w, o := s.wrapper(c), s.wrapper(other)
			sealtest.Run(t, func(*testing.T) sealtest.Harness {
				return sealtest.Harness{Wrapper: w, Other: o, Memory: seal.Memory{}, Stride: 5}
			})
		})
	}
}

func tokenAuth(s *server) vault.Auth {
	s.t.Helper()
	secret := s.must("auth/token/create", map[string]any{"policies": []string{"kleidi"}, "period": "24h", "no_default_policy": true})
	return vault.Auth{Method: vault.MethodToken, TokenFile: s.write("token", []byte(secret.Auth.ClientToken+"\n"))}
}

func appRole(s *server) string {
	s.t.Helper()
	s.must("sys/auth/approle", map[string]any{"type": "approle"})
	s.must("auth/approle/role/kleidi", map[string]any{"token_policies": "kleidi", "token_ttl": "1m", "token_no_default_policy": true})
	id, err := s.root.Logical().ReadWithContext(s.t.Context(), "auth/approle/role/kleidi/role-id")
	if err != nil {
		s.t.Fatal(err)
	}
	s.roleID = field(s.t, id, "role_id")
	return s.roleID
}

func appRoleAuth(s *server) vault.Auth {
	s.t.Helper()
	id := appRole(s)
	secret := field(s.t, s.must("auth/approle/role/kleidi/secret-id", nil), "secret_id")
	return vault.Auth{Method: vault.MethodAppRole, RoleID: id, SecretIDFile: s.write("secret-id", []byte(secret+"\n"))}
}

// wrappedAuth: a wrapping token opens once, so only one wrapper may log in with it; the
// suite's Other refuses slots before that.
func wrappedAuth(s *server) vault.Auth {
	s.t.Helper()
	id := appRole(s)
	return vault.Auth{Method: vault.MethodAppRole, RoleID: id, SecretIDWrapped: true, SecretIDFile: s.write("secret-id", wrappedSecretID(s))}
}

func wrappedSecretID(s *server) []byte {
	s.t.Helper()
	c := s.client(s.root.Token())
	c.SetWrappingLookupFunc(func(string, string) string { return "5m" })
	secret, err := c.Logical().WriteWithContext(s.t.Context(), "auth/approle/role/kleidi/secret-id", nil)
	if err != nil {
		s.t.Fatal(err)
	}
	return []byte(secret.WrapInfo.Token)
}

func certAuth(s *server) vault.Auth {
	s.t.Helper()
	s.must("sys/auth/cert", map[string]any{"type": "cert"})
	s.must("auth/cert/certs/kleidi", map[string]any{"certificate": string(s.ca.pem), "allowed_common_names": "node-1",
		"token_policies": "kleidi", "token_ttl": "1m", "token_no_default_policy": true})
	s.ca.issue(s.t, s.path("client"), "node-1")
	return vault.Auth{Method: vault.MethodCert, Role: "kleidi", CertFile: s.path("client.crt"), KeyFile: s.path("client.key")}
}

func jwtAuth(s *server) vault.Auth {
	s.t.Helper()
	if s.jwtKey == nil {
		s.jwtKey = newKey(s.t)
	}
	s.must("sys/auth/jwt", map[string]any{"type": "jwt"})
	s.must("auth/jwt/config", map[string]any{
		"jwt_validation_pubkeys": string(publicPEM(s.t, s.jwtKey)), "bound_issuer": "https://issuer.test"})
	s.must("auth/jwt/role/kleidi", map[string]any{"role_type": "jwt", "user_claim": "sub", "bound_audiences": "vault",
		"bound_subject": "node-1", "token_policies": "kleidi", "token_ttl": "1m", "token_no_default_policy": true})
	return vault.Auth{Method: vault.MethodJWT, Role: "kleidi", JWTFile: s.write("jwt", []byte(newJWT(s.t, s.jwtKey, "node-1")))}
}

func publicPEM(t *testing.T, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
}

// newJWT signs a token as an identity provider would.
func newJWT(t *testing.T, key *ecdsa.PrivateKey, subject string) string {
	t.Helper()
	part := func(v any) string {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return base64.RawURLEncoding.EncodeToString(b)
	}
	text := part(map[string]string{"alg": "ES256", "typ": "JWT"}) + "." + part(map[string]any{
		"iss": "https://issuer.test", "aud": "vault", "sub": subject, "iat": time.Now().Unix() - 5, "exp": time.Now().Unix() + 3600})
	digest := sha256.Sum256([]byte(text))
	r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	signature := make([]byte, 64)
	r.FillBytes(signature[:32])
	s.FillBytes(signature[32:])
	return text + "." + base64.RawURLEncoding.EncodeToString(signature)
}
