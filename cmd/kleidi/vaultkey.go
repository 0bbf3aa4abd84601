package main

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
)

// maxChain bounds the file of a client certificate and its chain, in bytes.
const maxChain = 1 << 20

// vaultKey is what kleidi vault-key made.
type vaultKey struct {
	Key     string `json:"key"`
	Request string `json:"certificateRequest"`
	Name    string `json:"name"`
	Bank    string `json:"bank"`
}

func (a *app) newVaultKey() *cobra.Command {
	var out, csr, name string
	cmd := &cobra.Command{
		Use:   "vault-key --out FILE --csr FILE",
		Short: "Make a key in this machine's TPM to log in to Vault with",
		Long: `Make a client key in this machine's TPM, for Vault's and OpenBao's certificate
authentication, and a certificate request for the CA that issues nodes' certificates.
The key never leaves the TPM. What is written is of no use to another machine, so that
no credential lies on the disk. docs/vault.md goes on from there.

The key signs only while PCR 7, the state and the keys of Secure Boot, is what it is
now, and Secure Boot must be on. After a change of these, or when the TPM was cleared,
make a new one.`,
		Example: `  kleidi vault-key --out /etc/kleidi/vault/node.tpmkey --csr node.csr`,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			n, err := a.node()
			if err != nil {
				return err
			}
			k := &vaultKey{Key: out, Request: csr, Name: name, Bank: n.cfg.TPM.Bank}
			if k.Name == "" {
				k.Name = n.cfg.Node
			}
			if err := n.makeVaultKey(cmd.Context(), k); err != nil {
				return requireRoot(fmt.Errorf("vault-key: %w", err))
			}
			return a.show(cmd.OutOrStdout(), k, func(w io.Writer) { printVaultKey(w, k) })
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&out, "out", "", "new file for the key, which vault.auth.tpmKeyFile names")
	flags.StringVar(&csr, "csr", "", "new file for the certificate request, in PEM")
	flags.StringVar(&name, "name", "", "common name in the request (default: this node's name)")
	for _, name := range []string{"out", "csr"} {
		_ = cmd.MarkFlagRequired(name)
		_ = cmd.MarkFlagFilename(name)
	}
	return cmd
}

func printVaultKey(w io.Writer, k *vaultKey) {
	fmt.Fprintf(w, "client key made in the TPM, of use to this machine alone, written to %s\n", k.Key)
	fmt.Fprintf(w, "certificate request for %q written to %s: have your CA sign it, then set\nvault.auth.tpmKeyFile and vault.auth.certFile\n", k.Name, k.Request)
	fmt.Fprintf(w, "it signs while PCR 7 (%s) is what it is now: make a new one when Secure Boot's state or keys change\n", k.Bank)
}

// makeVaultKey makes both files, or none.
func (n *node) makeVaultKey(ctx context.Context, k *vaultKey) error {
	for _, path := range []string{k.Key, k.Request} {
		if _, err := os.Lstat(path); err == nil {
			return fmt.Errorf("%s exists; name another file", path)
		}
	}
	if err := n.gate.Holds(ctx, "use the key", []int{7}, "keep the client key in a file, with vault.auth.keyFile"); err != nil {
		return err
	}
	blob, _, err := n.gate.Device.NewClientKey(ctx, n.gate.Owner, n.gate.Bank)
	if err != nil {
		return err
	}
	signer, err := n.gate.Device.ClientSigner(ctx, n.gate.Owner, blob)
	if err != nil {
		return err
	}
	request, err := certificateRequest(signer, k.Name)
	if err != nil {
		return fmt.Errorf("certificate request: %w", err)
	}
	if err := writeNew(k.Key, blob); err != nil {
		return err
	}
	if err := writeNew(k.Request, request); err != nil {
		return errors.Join(err, os.Remove(k.Key))
	}
	return nil
}

// certificateRequest asks for a certificate in PEM; what it may be used for is the
// CA's to say.
func certificateRequest(signer crypto.Signer, name string) ([]byte, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: name}, SignatureAlgorithm: x509.ECDSAWithSHA256}, signer)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), err
}

// clientCertificate is what vault logs in with where its key is in the TPM. Both
// files are read anew each time, so replacing them is enough.
func (n *node) clientCertificate(ctx context.Context) (*tls.Certificate, error) {
	auth := n.cfg.Vault.Auth
	blob, err := readFile(auth.TPMKeyFile, tpm.MaxClientKey)
	if err != nil {
		return nil, seal.Errorf(seal.CauseCredentials, "make the key with kleidi vault-key, or correct vault.auth.tpmKeyFile", "vault.auth.tpmKeyFile: %w", err)
	}
	signer, err := n.gate.Device.ClientSigner(ctx, n.gate.Owner, blob)
	if err != nil {
		return nil, fmt.Errorf("vault.auth.tpmKeyFile: %s: %w", auth.TPMKeyFile, err)
	}
	b, err := readFile(auth.CertFile, maxChain)
	if err != nil {
		return nil, seal.Errorf(seal.CauseCredentials, "put the certificate there that was issued for the key, or correct vault.auth.certFile", "vault.auth.certFile: %w", err)
	}
	certificate, err := certificateFor(signer, b)
	if err != nil {
		return nil, seal.Errorf(seal.CauseCredentials, "put the certificate there that was issued for the key in vault.auth.tpmKeyFile", "vault.auth.certFile: %s: %w", auth.CertFile, err)
	}
	return certificate, nil
}

// certificateFor pairs a key with the PEM certificates that begin with its own.
func certificateFor(signer crypto.Signer, b []byte) (*tls.Certificate, error) {
	if len(b) > maxChain {
		return nil, fmt.Errorf("more than %d bytes", maxChain)
	}
	c := &tls.Certificate{PrivateKey: signer, SupportedSignatureAlgorithms: []tls.SignatureScheme{tls.ECDSAWithP256AndSHA256}}
	for block, rest := pem.Decode(b); block != nil; block, rest = pem.Decode(rest) {
		if block.Type == "CERTIFICATE" {
			c.Certificate = append(c.Certificate, block.Bytes)
		}
	}
	if len(c.Certificate) == 0 {
		return nil, errors.New("no PEM certificate in it")
	}
	leaf, err := x509.ParseCertificate(c.Certificate[0])
	if err != nil {
		return nil, err
	}
	key, ok := leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !key.Equal(signer.Public()) {
		return nil, errors.New("its first certificate is of another key")
	}
	c.Leaf = leaf
	return c, nil
}
