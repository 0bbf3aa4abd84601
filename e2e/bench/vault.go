package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/beezy-dev/kleidi/vault"
)

// startVault runs a real Vault with the Transit key "kleidi", and returns a wrapper
// that logs in with a token. It builds Vault if necessary, which takes minutes.
func startVault(ctx context.Context, dir string) (*vault.Wrapper, func(), error) {
	binary, err := exec.CommandContext(ctx, "e2e/servers/build", "vault").Output()
	if err != nil {
		return nil, nil, fmt.Errorf("e2e/servers/build: %w; run bench in the repository's root, or leave vault out of -wrappers", err)
	}
	address, err := freeAddress()
	if err != nil {
		return nil, nil, err
	}
	path := func(name string) string { return filepath.Join(dir, name) }
	if err := selfSigned(path("server.crt"), path("server.key")); err != nil {
		return nil, nil, err
	}
	cmd := exec.Command(strings.TrimSpace(string(binary)), "-addr", address, "-dir", dir, "-tls-cert", path("server.crt"), "-tls-key", path("server.key"))
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, nil, err
	}
	stop := func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }
	client, err := rootClient(ctx, "https://"+address, path("server.crt"), path("root-token"))
	if err == nil {
		err = setUp(ctx, client, path("token"))
	}
	if err != nil {
		return nil, stop, fmt.Errorf("vault: %w", err)
	}
	w, err := vault.New(vault.Config{Address: "https://" + address, Key: "kleidi", CAFile: path("server.crt"),
		Auth: vault.Auth{Method: vault.MethodToken, TokenFile: path("token")}})
	return w, stop, err
}

// rootClient waits until the server answers.
func rootClient(ctx context.Context, url, ca, tokenFile string) (*api.Client, error) {
	config := api.DefaultConfig()
	config.Address = url
	if err := config.ConfigureTLS(&api.TLSConfig{CACert: ca}); err != nil {
		return nil, err
	}
	client, err := api.NewClient(config)
	if err != nil {
		return nil, err
	}
	return client, until(ctx, startLimit, func() error {
		token, err := os.ReadFile(tokenFile)
		if err != nil {
			return err
		}
		client.SetToken(string(token))
		_, err = client.Sys().ListMountsWithContext(ctx)
		return err
	})
}

func setUp(ctx context.Context, c *api.Client, tokenFile string) error {
	mountErr := c.Sys().MountWithContext(ctx, "transit", &api.MountInput{Type: "transit"})
	_, keyErr := c.Logical().WriteWithContext(ctx, "transit/keys/kleidi", nil)
	policyErr := c.Sys().PutPolicyWithContext(ctx, "kleidi", `path "transit/+/kleidi" { capabilities = ["update"] }`)
	token, err := c.Auth().Token().CreateWithContext(ctx, &api.TokenCreateRequest{Policies: []string{"kleidi"}})
	if err := errors.Join(mountErr, keyErr, policyErr, err); err != nil {
		return err
	}
	return os.WriteFile(tokenFile, []byte(token.Auth.ClientToken), 0o600)
}

func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// selfSigned writes a certificate for 127.0.0.1 and its key.
func selfSigned(certificate, private string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	return errors.Join(
		os.WriteFile(certificate, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600),
		os.WriteFile(private, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8}), 0o600))
}
