// Package ha runs three control-plane nodes, each on a separate host with its own TPM,
// kleidi and kube-apiserver, over one etcd of three members. It needs root.
package ha
