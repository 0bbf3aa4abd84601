// Package objects proves kleidi's count of stored objects on a real kube-apiserver and a
// real etcd: Secrets, ConfigMaps and custom resources are written, the KEK is rotated,
// the objects are migrated, and at each step `kleidi usage` is compared with an
// independent count of etcd's raw values.
package objects
