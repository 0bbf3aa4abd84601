// Command pkcs11plugin is a KMS v2 plugin on a PKCS#11 token, as Kubernetes' own mock plugin
// is: its server is k8s.io/kms/pkg/service, and its access to the token is crypto11. It
// shares no code with kleidi. The tests use it as another vendor's plugin.
package main

import (
	"context"
	"crypto/cipher"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/ThalesGroup/crypto11"
	"k8s.io/kms/pkg/service"
)

// annotation holds the nonce of a ciphertext.
const annotation = "nonce.pkcs11plugin.example.com"

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	socket := flag.String("socket", "", "path of the socket to listen on")
	module := flag.String("module", "", "path of the PKCS#11 module")
	token := flag.String("token", "", "label of the token")
	pinFile := flag.String("pin-file", "", "file with the user PIN")
	key := flag.String("key", "", "label of the AES key that encrypts, which is made if it is not there; other keys of the token decrypt")
	flag.Parse()
	pin, err := os.ReadFile(*pinFile)
	if err != nil {
		return err
	}
	session, err := crypto11.Configure(&crypto11.Config{Path: *module, TokenLabel: *token, Pin: strings.TrimSpace(string(pin))})
	if err != nil {
		return err
	}
	defer session.Close()
	p := &plugin{session: session, key: *key}
	if _, err := p.aead(*key); err != nil {
		if _, err := session.GenerateSecretKeyWithLabel([]byte(rand.Text()), []byte(*key), 256, crypto11.CipherAES); err != nil {
			return err
		}
	}
	return service.NewGRPCService(*socket, time.Minute, p).ListenAndServe()
}

// plugin names each key by its label.
type plugin struct {
	session *crypto11.Context
	key     string
}

func (p *plugin) Status(context.Context) (*service.StatusResponse, error) {
	return &service.StatusResponse{Version: "v2", Healthz: "ok", KeyID: p.key}, nil
}

func (p *plugin) Encrypt(_ context.Context, _ string, data []byte) (*service.EncryptResponse, error) {
	aead, err := p.aead(p.key)
	if err != nil {
		return nil, err
	}
	nonce := make([]byte, aead.NonceSize())
	rand.Read(nonce)
	return &service.EncryptResponse{KeyID: p.key, Ciphertext: aead.Seal(nil, nonce, data, nil), Annotations: map[string][]byte{annotation: nonce}}, nil
}

func (p *plugin) Decrypt(_ context.Context, _ string, r *service.DecryptRequest) ([]byte, error) {
	aead, err := p.aead(r.KeyID)
	if err != nil {
		return nil, err
	}
	nonce := r.Annotations[annotation]
	if len(r.Annotations) != 1 || len(nonce) != aead.NonceSize() {
		return nil, errors.New("the annotations are not this plugin's")
	}
	return aead.Open(nil, nonce, r.Ciphertext, nil)
}

func (p *plugin) aead(label string) (cipher.AEAD, error) {
	key, err := p.session.FindKey(nil, []byte(label))
	if err != nil {
		return nil, err
	}
	return key.NewGCM()
}
