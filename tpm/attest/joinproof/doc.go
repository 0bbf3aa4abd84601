// Package joinproof is what a node proves before it is given the KEK, and what the node
// that gives it demands. It is a purpose of the protocol in package exchange.
//
// A joining node J claims in its [Hello], beside who it is, what its TPM slots will
// demand: PCRs and their bank, epoch index and value, perhaps a remote verifier and a
// signer of boot states. All of it is the context of the exchange, so that the quote and
// the proof cover it. The verifier V, a node that has the KEK, demands what an operator
// has approved ([Approval]), and afterwards knows how to wrap the KEK for J ([Proven]),
// from nothing but what was proven.
//
// A false epoch value is J's own harm: it is covered as well, and J seals its own slots
// by its own counter.
//
// The package opens no connection and no file, and keeps nothing between exchanges. An
// approval's expiry and its one use are for the caller.
package joinproof
