// Package kubernetes runs the kleidi binary behind a real kube-apiserver and a real
// etcd, on a swtpm with simulated boots. Each test has a separate machine with TPM,
// kleidi, etcd and kube-apiserver, and runs for the newest and for the oldest
// Kubernetes with KMS v2. The machines run side by side, because most of the time is
// spent waiting for kube-apiserver's own probes.
//
// The tests look at stored data rather than at messages: they read raw values from
// etcd, and tpm2-tools loads and describes the sealed object.
package kubernetes
