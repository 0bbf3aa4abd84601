// Package kubernetes runs the kleidi binary behind a real kube-apiserver and a
// real etcd, on a swtpm that boots as told. Each test is a machine of its own:
// TPM, kleidi, etcd and kube-apiserver, run for the newest and the oldest
// Kubernetes that has KMS v2. The machines run side by side, since most of the
// time goes into waiting for kube-apiserver's own probes.
//
// It looks at what is stored, not at what is said: raw values are read from
// etcd, the sealed object is loaded and described by tpm2-tools.
package kubernetes
