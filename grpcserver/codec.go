package grpcserver

import (
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	kmsapi "k8s.io/kms/apis/v2"
)

// codec is gRPC's own codec for protobuf, with two differences. The handler answers a
// message that does not parse, because gRPC would call it an internal error. And a
// decrypted DEK seed does not stay in its response. (We can't clear the buffers of gRPC
// itself.)
type codec struct{ encoding.CodecV2 }

// request is a received message, or the reason why it does not parse.
type request[Req any] struct {
	message Req
	err     error
}

// received lets the codec see through request's type parameter.
type received interface {
	target() any
	malformed(error)
}

func (r *request[Req]) target() any         { return &r.message }
func (r *request[Req]) malformed(err error) { r.err = err }

// Unmarshal implements encoding.CodecV2.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	r, ok := v.(received)
	if !ok {
		return c.CodecV2.Unmarshal(data, v)
	}
	if err := c.CodecV2.Unmarshal(data, r.target()); err != nil {
		r.malformed(err)
	}
	return nil
}

// Marshal implements encoding.CodecV2.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	b, err := c.CodecV2.Marshal(v)
	if r, ok := v.(*kmsapi.DecryptResponse); ok {
		clear(r.Plaintext)
	}
	return b, err
}
