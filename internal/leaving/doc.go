// Package leaving takes a node out of a cluster: [Remove] on the nodes that remain, and
// [Reset] on the machine that leaves.
package leaving
