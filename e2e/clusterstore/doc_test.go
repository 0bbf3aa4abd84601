// Package clusterstore runs the conformance tests of cluster stores on the API of a real
// kube-apiserver over a real etcd. Faults come from between the two: answers are
// dropped, requests arrive late, and etcd is put back to an older state while
// kube-apiserver runs.
package clusterstore
