// Package interop lets an independent verifier judge kleidi's evidence: go-tpm-tools'
// verifier, which knows nothing of kleidi, receives the evidence that package attest
// collects, in go-tpm-tools' own form. It is a separate module because that verifier
// depends on the libraries of confidential computing.
package interop
