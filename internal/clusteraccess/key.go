package clusteraccess

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/credential"
)

// parseKey reads a private key in PEM.
func parseKey(b []byte) (crypto.Signer, error) {
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, errors.New("no private key in PEM in it")
	}
	defer clear(block.Bytes)
	if key, err := x509.ParseECPrivateKey(block.Bytes); err == nil {
		return key, nil
	}
	if key, err := x509.ParsePKCS1PrivateKey(block.Bytes); err == nil {
		return key, nil
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, err
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("a %T can't sign", key)
	}
	return signer, nil
}

// replaceable is a key in the TPM whose refusals say how to replace it here: the key's own
// hint is for Vault.
type replaceable struct{ crypto.Signer }

// Sign implements crypto.Signer.
func (r replaceable) Sign(rand io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	signature, err := r.Signer.Sign(rand, digest, opts)
	return signature, hintSetUp(err)
}

func hintSetUp(err error) error {
	if e, ok := errors.AsType[*seal.Error](err); ok && e.Cause == seal.CauseCredentials {
		return seal.Errorf(e.Cause, "run kleidi cluster setup --kubeconfig FILE on this node", "%w", e.Err)
	}
	return err
}

// key is the node's key and its file.
type key struct {
	crypto.Signer
	path  string
	inTPM bool
	made  bool
	// whyFile is the reason why the key is not in the TPM.
	whyFile string
}

// takeKey returns the node's present key if it still signs, or else a new one.
func (a *Access) takeKey(ctx context.Context, inFile bool) (*key, error) {
	whyFile := "--key-in-file was given"
	if !inFile {
		k, err := a.tpmKey(ctx)
		if err == nil {
			return k, nil
		}
		if k != nil {
			return nil, err
		}
		whyFile = err.Error()
	}
	k := &key{path: a.beside(extKey), whyFile: whyFile}
	signer, _, err := a.signer(ctx, k.path)
	if err == nil {
		k.Signer = signer
		return k, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w; remove the file to have another key made", err)
	}
	made, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(made)
	if err != nil {
		return nil, err
	}
	defer clear(der)
	b := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	defer clear(b)
	k.Signer, k.made = made, true
	return k, files.WriteNew(k.path, b)
}

// tpmKey returns the key in the TPM. The key is nil if no TPM can keep one.
func (a *Access) tpmKey(ctx context.Context) (*key, error) {
	k := &key{path: a.beside(extTPMKey), inTPM: true}
	if signer, _, err := a.signer(ctx, k.path); err == nil && signs(signer) == nil {
		k.Signer = signer
		return k, nil
	}
	if err := a.Gate.Holds(ctx, "use the key", []int{7}, "keep the key in a file, with --key-in-file"); err != nil {
		return nil, err
	}
	blob, _, err := credential.NewClientKey(ctx, a.Gate.Device, a.Gate.Owner, a.Gate.Bank)
	if err != nil {
		return k, err
	}
	if k.Signer, err = credential.ClientSigner(ctx, a.Gate.Device, a.Gate.Owner, blob); err != nil {
		return k, err
	}
	k.made = true
	return k, files.Replace(k.path, blob)
}

// signs proves that a key can sign.
func signs(s crypto.Signer) error {
	digest := sha256.Sum256([]byte("kleidi"))
	_, err := s.Sign(rand.Reader, digest[:], crypto.SHA256)
	return err
}

// removeOther removes the file of the other kind of key, which is no longer used.
func (k *key) removeOther(a *Access) error {
	other := a.beside(extTPMKey)
	if k.inTPM {
		other = a.beside(extKey)
	}
	if err := os.Remove(other); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// request returns a certificate request in PEM for the node's user.
func (a *Access) request(s crypto.Signer) ([]byte, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: a.User()}}, s)
	if err != nil {
		return nil, fmt.Errorf("certificate request: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), nil
}

// signer returns the key in a file, or the TPM key that the file describes.
func (a *Access) signer(ctx context.Context, path string) (s crypto.Signer, inTPM bool, err error) {
	b, err := files.ReadPrivateKey(path)
	if err != nil {
		return nil, false, err
	}
	defer clear(b)
	if bytes.HasPrefix(b, []byte("{")) {
		if s, err = credential.ClientSigner(ctx, a.Gate.Device, a.Gate.Owner, b); err == nil {
			s = replaceable{s}
		}
		err, inTPM = hintSetUp(err), true
	} else {
		s, err = parseKey(b)
	}
	if err != nil {
		return nil, false, fmt.Errorf("%s: %w", path, err)
	}
	return s, inTPM, nil
}
