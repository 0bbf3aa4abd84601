// Package grpcserver serves KMS v2 (k8s.io/kms/apis/v2) to kube-apiserver over a unix
// socket.
//
// It holds no key and knows no TPM: [Keys] does the work, from memory. The package
// stands between Keys and a peer. It decides who may call, bounds each request, turns
// every failure into a gRPC status with a hint, and keeps running whatever arrives.
//
// If no KEK is open, it answers with an error, never with an unhealthy string in
// Status: kube-apiserver goes on writing while the key ID stays the same and the call
// succeeds, regardless of healthz.
package grpcserver
