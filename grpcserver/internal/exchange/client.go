package exchange

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"fmt"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/beezy-dev/kleidi/seal"
)

// Digest returns the name of a certificate (DER): "sha256:" and the hexadecimal
// SHA-256.
func Digest(certificate []byte) string {
	sum := sha256.Sum256(certificate)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// ParseDigest reads a result of Digest.
func ParseDigest(s string) ([]byte, error) {
	digest, ok := strings.CutPrefix(s, "sha256:")
	b, err := hex.DecodeString(digest)
	if !ok || err != nil || len(b) != sha256.Size {
		return nil, fmt.Errorf("%.80q is not a digest; want sha256: and 64 hexadecimal digits", s)
	}
	return b, nil
}

// Pin makes config accept only the certificate with the given digest, whatever its names
// and dates. It stores the refusal of any other certificate in refused, because gRPC
// reports the refusal only as text.
func Pin(config *tls.Config, digest []byte, refused *error) {
	config.InsecureSkipVerify = true // VerifyConnection checks instead
	config.VerifyConnection = func(s tls.ConnectionState) error {
		if sum := sha256.Sum256(s.PeerCertificates[0].Raw); !bytes.Equal(sum[:], digest) {
			*refused = fmt.Errorf("its certificate is sha256:%x, not the one that is configured", sum)
		}
		return *refused
	}
}

// Dial prepares a connection to address. maxReceived bounds an answer, in bytes.
func Dial(address string, config *tls.Config, maxReceived int) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(credentials.NewTLS(config)), grpc.WithNoProxy(), grpc.WithDisableRetry(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxReceived), grpc.MaxCallSendMsgSize(MaxMessage)))
}

// Open begins an exchange on conn.
func Open(ctx context.Context, conn *grpc.ClientConn, s Service) (grpc.ClientStream, error) {
	return conn.NewStream(ctx, &grpc.StreamDesc{StreamName: s.Method, ServerStreams: true, ClientStreams: true}, "/"+s.Name+"/"+s.Method)
}

// ExporterOf returns the exporter value of a stream's TLS connection. It is known once
// the other side has answered.
func ExporterOf(stream grpc.ClientStream, label string) ([]byte, error) {
	p, ok := peer.FromContext(stream.Context())
	if !ok {
		return nil, ErrTLS
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return nil, ErrTLS
	}
	return exporterOf(info, label)
}

// Quoted marks the other side's text as a quotation.
func Quoted(s string, limit int) string {
	return `"` + strings.ReplaceAll(seal.OneLine(s, limit), `"`, "'") + `"`
}
