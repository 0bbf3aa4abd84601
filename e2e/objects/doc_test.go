// Package objects proves kleidi's count of stored objects on a real kube-apiserver and a
// real etcd: Secrets, ConfigMaps and custom resources are written, the KEK is rotated,
// the objects are migrated, and at each step `kleidi usage` is compared with an
// independent count of etcd's raw values. The same is counted over kine, with SQLite and with
// PostgreSQL, whose server needs root to become another user.
package objects
