// Package grpcserver serves KMS v2 (k8s.io/kms/apis/v2) to kube-apiserver over a
// unix socket.
//
// It holds no key and knows no TPM: [Keys] does the work, from memory. The
// package is what stands between Keys and a peer: it decides who may ask, bounds what is
// asked, turns every failure into a gRPC status that says what to do next, and
// keeps running whatever arrives.
//
// When no KEK is open it answers with an error, never with an unhealthy string
// in Status: kube-apiserver goes on writing for as long as the key ID stays the
// same and the call succeeds, whatever healthz says.
package grpcserver
