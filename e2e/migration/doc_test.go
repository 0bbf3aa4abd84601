// Package migration takes a cluster of real kube-apiservers with one etcd from each other
// provider to kleidi, back from the middle, and out again, with the commands that kleidi
// prints. At each step all objects are read, and etcd's raw values are counted without
// kleidi.
package migration
