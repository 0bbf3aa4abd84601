package migration

//lint:file-ignore SA1019 KMS v1 is the deprecated protocol that clusters move away from.

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"net"
	"testing"

	"google.golang.org/grpc"
	"k8s.io/kms/apis/v1beta1"
	kmsapi "k8s.io/kms/apis/v2"
)

// box encrypts for both versions of the other plugin.
type box struct{ cipher.AEAD }

func newBox(t *testing.T) box {
	t.Helper()
	key := make([]byte, 32)
	_, _ = rand.Read(key)
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	gcm, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		t.Fatal(err)
	}
	return box{gcm}
}

func (b box) seal(plain []byte) []byte           { return b.Seal(nil, nil, plain, nil) }
func (b box) open(sealed []byte) ([]byte, error) { return b.Open(nil, nil, sealed, nil) }

// pluginV2 is another KMS v2 plugin, like kleidi 1.x.
type pluginV2 struct {
	kmsapi.UnimplementedKeyManagementServiceServer
	box
}

func (p pluginV2) Status(context.Context, *kmsapi.StatusRequest) (*kmsapi.StatusResponse, error) {
	return &kmsapi.StatusResponse{Version: "v2", Healthz: "ok", KeyId: "other-key"}, nil
}

func (p pluginV2) Encrypt(_ context.Context, r *kmsapi.EncryptRequest) (*kmsapi.EncryptResponse, error) {
	return &kmsapi.EncryptResponse{Ciphertext: p.seal(r.GetPlaintext()), KeyId: "other-key"}, nil
}

func (p pluginV2) Decrypt(_ context.Context, r *kmsapi.DecryptRequest) (*kmsapi.DecryptResponse, error) {
	plain, err := p.open(r.GetCiphertext())
	return &kmsapi.DecryptResponse{Plaintext: plain}, err
}

// pluginV1 is a KMS v1 plugin, like Trousseau.
type pluginV1 struct {
	v1beta1.UnimplementedKeyManagementServiceServer
	box
}

func (p pluginV1) Version(context.Context, *v1beta1.VersionRequest) (*v1beta1.VersionResponse, error) {
	return &v1beta1.VersionResponse{Version: "v1beta1", RuntimeName: "other", RuntimeVersion: "1"}, nil
}

func (p pluginV1) Encrypt(_ context.Context, r *v1beta1.EncryptRequest) (*v1beta1.EncryptResponse, error) {
	return &v1beta1.EncryptResponse{Cipher: p.seal(r.GetPlain())}, nil
}

func (p pluginV1) Decrypt(_ context.Context, r *v1beta1.DecryptRequest) (*v1beta1.DecryptResponse, error) {
	plain, err := p.open(r.GetCipher())
	return &v1beta1.DecryptResponse{Plain: plain}, err
}

// servePlugin serves a plugin on a socket until the test ends.
func servePlugin(t *testing.T, socket string, register func(*grpc.Server)) {
	t.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	register(s)
	go func() { _ = s.Serve(l) }()
	t.Cleanup(s.Stop)
}
