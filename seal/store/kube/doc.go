// Package kube is the cluster store in the API of the cluster itself: custom resources
// of the group kleidi.beezy.dev, cluster-scoped.
//
//	Keyring      cluster   the shared keyring
//	KeyringNode  NAME      the record of a node
//
// Package deploy/cluster holds their definitions. The summary in each object is for
// display and for printer columns: nothing here reads it.
//
// The API is slow to fail and may answer late. So a swap tests the very bytes that it
// replaces, and the result of a swap with an unknown outcome is read back. Reads ask
// etcd, not the watch cache of kube-apiserver: after etcd was restored from a snapshot,
// the cache may answer with the earlier content.
package kube
