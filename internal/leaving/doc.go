// Package leaving takes a node out of a cluster: [Reset] makes the machine itself forget the
// keyring.
package leaving
