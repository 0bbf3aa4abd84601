package grpcserver

import (
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	kmsapi "k8s.io/kms/apis/v2"

	"github.com/beezy-dev/kleidi/seal"
)

// Bounds of a request's fields, in bytes. kube-apiserver accepts ciphertexts
// and key IDs of 1 to 1024 bytes (k8s.io/apiserver, kmsv2/envelope.go).
const (
	// MaxPlaintext leaves room for kleidi's 29 bytes: format, nonce, tag.
	MaxPlaintext  = MaxCiphertext - 29
	MaxCiphertext = 1024
	MaxKeyID      = 1024
	// MaxUID bounds the request's uid, which kube-apiserver generates for its logs (36
	// bytes).
	MaxUID = 256
)

func (s *Server) status(*kmsapi.StatusRequest) (*kmsapi.StatusResponse, error) {
	id, err := s.keys.CurrentID()
	if err == nil {
		err = checkOwn("key ID", len(id), MaxKeyID)
	}
	if err != nil {
		return nil, s.failed("Status", err, "")
	}
	return &kmsapi.StatusResponse{Version: "v2", Healthz: "ok", KeyId: string(id)}, nil
}

func (s *Server) encrypt(in *kmsapi.EncryptRequest) (*kmsapi.EncryptResponse, error) {
	defer clear(in.Plaintext)
	if err := checkSize("uid", len(in.Uid), 0, MaxUID); err != nil {
		return nil, err
	}
	if err := checkSize("plaintext", len(in.Plaintext), 1, MaxPlaintext); err != nil {
		return nil, err
	}
	ciphertext, id, err := s.keys.Encrypt(in.Plaintext)
	if err == nil {
		err = checkOwn("key ID", len(id), MaxKeyID)
	}
	if err == nil {
		err = checkOwn("ciphertext", len(ciphertext), MaxCiphertext)
	}
	if err != nil {
		return nil, s.failed("Encrypt", err, "")
	}
	return &kmsapi.EncryptResponse{Ciphertext: ciphertext, KeyId: string(id)}, nil
}

func (s *Server) decrypt(in *kmsapi.DecryptRequest) (*kmsapi.DecryptResponse, error) {
	if err := checkDecrypt(in); err != nil {
		return nil, err
	}
	plaintext, err := s.keys.Decrypt(seal.KeyID(in.KeyId), in.Ciphertext)
	if err != nil {
		return nil, s.failed("Decrypt", err, in.KeyId)
	}
	return &kmsapi.DecryptResponse{Plaintext: plaintext}, nil
}

func checkDecrypt(in *kmsapi.DecryptRequest) error {
	if err := checkSize("uid", len(in.Uid), 0, MaxUID); err != nil {
		return err
	}
	if err := checkSize("key_id", len(in.KeyId), 1, MaxKeyID); err != nil {
		return err
	}
	if err := checkSize("ciphertext", len(in.Ciphertext), 1, MaxCiphertext); err != nil {
		return err
	}
	if len(in.Annotations) > 0 {
		return errAnnotes
	}
	return nil
}

func checkSize(field string, n, low, high int) error {
	if n >= low && n <= high {
		return nil
	}
	return status.Errorf(codes.InvalidArgument, "%s: has %d bytes, want %d to %d; is the caller a kube-apiserver?", field, n, low, high)
}

// checkOwn refuses an answer that kube-apiserver would refuse: the fault is then ours.
func checkOwn(what string, n, high int) error {
	if n >= 1 && n <= high {
		return nil
	}
	return fmt.Errorf("own %s of %d bytes, want 1 to %d", what, n, high)
}

func (s *Server) failed(method string, err error, id string) error {
	st, log := statusOf(err, id)
	if log {
		s.log.Error("KMS call failed", "method", method, "error", seal.OneLine(err.Error(), maxReason))
	}
	return st
}
