// Package usage counts which stored objects are under which key. It reads the values that
// kube-apiserver keeps in etcd, from a running etcd ([Etcd.Read]) or from the file of a
// snapshot ([Snapshot]), and decrypts none of them: kube-apiserver writes the name of the
// provider and the key ID in the clear before the ciphertext.
//
// Every byte that is read here is untrusted. A snapshot may be damaged or made by an
// attacker, and anyone who can write to etcd can write a value that claims any key. A
// count is therefore a proof about a store that nobody has tampered with: it finds the
// objects that a rotation left behind, not the ones that an attacker hides.
//
// The package parses etcd's answers without etcd's client library: it needs only two
// messages, and copies no page of values.
package usage
