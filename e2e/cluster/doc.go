// Package cluster runs real etcd members and kube-apiservers, as e2e/servers builds
// them, for the heavy tests that share it. A server runs on this machine's loopback, or
// on a separate host: a network namespace.
package cluster
