// Package joinproof defines the proofs that a node must give before it receives the
// KEK, and the checks of the node that gives the KEK. It is a purpose of the protocol
// in package exchange.
//
// In its [Hello] a joining node J claims its identity and the demands of its future TPM
// slots: PCRs and their bank, the index and the value of its epoch counter, perhaps a
// remote verifier and a signer of boot states. All these demands are the context of the
// exchange, so that the quote and the proof cover them. The verifier V, a node that has
// the KEK, demands what an operator has approved ([Approval]). Afterwards V knows how
// to wrap the KEK for J ([Proven]), from proven facts only.
//
// With a false epoch value, J harms only itself: the proof covers the value too, and J
// seals its own slots by its own counter.
//
// The package opens no connection and no file, and keeps nothing between exchanges. The
// caller handles the expiry of an approval and its single use.
package joinproof
