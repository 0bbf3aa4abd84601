package slots

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/credential"
)

// SealPIN writes the file after it has proven that the PIN unseals from it. It asks for
// the PIN only if it could use the PIN.
func SealPIN(ctx context.Context, n *node.Node, file string, readPIN func() (*seal.Secret, error)) (*SealedPIN, error) {
	file, err := filepath.Abs(file)
	if err != nil {
		return nil, err
	}
	if _, err := os.Lstat(file); err == nil {
		return nil, fmt.Errorf("%s exists; name another file", file)
	}
	if err := n.LockMemory(); err != nil {
		return nil, err
	}
	pcrs := []int{7}
	if err := n.Gate.Holds(ctx, "unseal the PIN", pcrs, "keep the PIN in a file, with pkcs11.pinFile"); err != nil {
		return nil, node.HintNeedsTPM(err)
	}
	pin, err := readPIN()
	if err != nil {
		return nil, err
	}
	defer pin.Close()
	blob, err := credential.Seal(ctx, n.Gate.Device, n.Gate.Owner, n.Gate.Bank, pin)
	if err != nil {
		return nil, node.HintNeedsTPM(err)
	}
	if err := provePIN(ctx, n, blob, pin); err != nil {
		return nil, err
	}
	if err := files.WriteNew(file, blob); err != nil {
		return nil, err
	}
	return &SealedPIN{File: file, Bank: n.Config.TPM.Bank, PCRs: pcrs}, nil
}

func provePIN(ctx context.Context, n *node.Node, blob []byte, pin *seal.Secret) error {
	got, err := credential.Unseal(ctx, n.Gate.Device, n.Gate.Owner, n.Memory, blob)
	if err != nil {
		return err
	}
	defer got.Close()
	if !got.Equal(pin) {
		return errors.New("the TPM did not return what it sealed; nothing was written; check whether the TPM is faulty")
	}
	return nil
}

// SealedPIN is the result of kleidi pkcs11-pin.
type SealedPIN struct {
	File    string `json:"sealedPINFile"`
	PINFile string `json:"pinFile,omitempty"`
	Bank    string `json:"bank"`
	PCRs    []int  `json:"pcrs"`
}

// MakeVaultKey makes both files, or neither.
func MakeVaultKey(ctx context.Context, n *node.Node, k *VaultKey) error {
	for _, path := range []string{k.Key, k.Request} {
		if _, err := os.Lstat(path); err == nil {
			return fmt.Errorf("%s exists; name another file", path)
		}
	}
	if err := n.Gate.Holds(ctx, "use the key", []int{7}, "keep the client key in a file, with vault.auth.keyFile"); err != nil {
		return err
	}
	blob, _, err := credential.NewClientKey(ctx, n.Gate.Device, n.Gate.Owner, n.Gate.Bank)
	if err != nil {
		return err
	}
	signer, err := credential.ClientSigner(ctx, n.Gate.Device, n.Gate.Owner, blob)
	if err != nil {
		return err
	}
	request, err := certificateRequest(signer, k.Name)
	if err != nil {
		return fmt.Errorf("certificate request: %w", err)
	}
	if err := files.WriteNew(k.Key, blob); err != nil {
		return err
	}
	if err := files.WriteNew(k.Request, request); err != nil {
		return errors.Join(err, os.Remove(k.Key))
	}
	return nil
}

// certificateRequest returns a certificate request in PEM. The CA decides what the
// certificate may be used for.
func certificateRequest(signer crypto.Signer, name string) ([]byte, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: name}, SignatureAlgorithm: x509.ECDSAWithSHA256}, signer)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), err
}

// VaultKey is the result of kleidi vault-key.
type VaultKey struct {
	Key     string `json:"key"`
	Request string `json:"certificateRequest"`
	Name    string `json:"name"`
	Bank    string `json:"bank"`
}
