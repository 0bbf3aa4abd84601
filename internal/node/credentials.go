package node

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"

	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/credential"
)

// sealedPIN returns the user PIN from its file sealed to the TPM. It reads the file
// again each time, so the file can be replaced.
func (n *Node) sealedPIN(ctx context.Context) (*seal.Secret, error) {
	path := n.Config.PKCS11.SealedPINFile
	blob, err := files.ReadOwned(path, credential.MaxFile)
	if err != nil {
		return nil, seal.Caused(seal.CauseCredentials, "make it with kleidi pkcs11-pin --pin-file FILE --out "+seal.Quote(path)+", or correct pkcs11.sealedPINFile", "pkcs11.sealedPINFile", err)
	}
	pin, err := credential.Unseal(ctx, n.Gate.Device, n.Gate.Owner, n.Memory, blob)
	if e, ok := errors.AsType[*seal.Error](HintNeedsTPM(err)); ok {
		return nil, seal.Errorf(e.Cause, e.Hint, "pkcs11.sealedPINFile: %s: %w", path, e.Err)
	}
	return pin, err
}

// HintNeedsTPM adds a hint for a machine without a TPM.
func HintNeedsTPM(err error) error {
	e, ok := errors.AsType[*seal.Error](err)
	if !ok || e.Cause != seal.CauseUnavailable {
		return err
	}
	return seal.Errorf(e.Cause, e.Hint+"; where there is no TPM, set pkcs11.pinFile instead", "a sealed PIN needs this machine's TPM: %w", e.Err)
}

// signed returns the boot states that this signer signed, from all files. It logs a
// faulty file, and still uses the others.
func (n *Node) signed(signer tpm.Signer) []authpolicy.SignedState {
	var all []authpolicy.SignedState
	for _, path := range append([]string{n.Config.BootStates()}, n.Config.TPM.BootStates...) {
		f, err := files.ReadBootStates(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			n.Log.Warn("signed boot states", "file", path, "error", err)
			continue
		}
		states, refused := f.Signed(signer.Key, signer.Ref)
		for _, err := range refused {
			n.Log.Warn("signed boot states", "file", path, "error", err)
		}
		all = append(all, states...)
	}
	return all
}

// clientCertificate returns the certificate with which vault logs in if its key is in
// the TPM. It reads both files again each time, so the files can be replaced.
func (n *Node) clientCertificate(ctx context.Context) (*tls.Certificate, error) {
	auth := n.Config.Vault.Auth
	blob, err := files.ReadOwned(auth.TPMKeyFile, credential.MaxClientKey)
	if err != nil {
		return nil, seal.Caused(seal.CauseCredentials, "make the key with kleidi vault-key --out "+seal.Quote(auth.TPMKeyFile)+" --csr FILE, or correct vault.auth.tpmKeyFile", "vault.auth.tpmKeyFile", err)
	}
	signer, err := credential.ClientSigner(ctx, n.Gate.Device, n.Gate.Owner, blob)
	if err != nil {
		return nil, fmt.Errorf("vault.auth.tpmKeyFile: %s: %w", auth.TPMKeyFile, err)
	}
	b, err := files.ReadOwned(auth.CertFile, files.MaxCertificates)
	if err != nil {
		return nil, seal.Caused(seal.CauseCredentials, "put the certificate there that was issued for the key, or correct vault.auth.certFile", "vault.auth.certFile", err)
	}
	certificate, err := files.CertificateFor(signer, b)
	if err != nil {
		return nil, seal.Errorf(seal.CauseCredentials, "put the certificate there that was issued for the key in vault.auth.tpmKeyFile", "vault.auth.certFile: %s: %w", auth.CertFile, err)
	}
	return certificate, nil
}
