// Package interop lets others judge kleidi's evidence: go-tpm-tools' verifier, which
// knows nothing of kleidi, receives the evidence that package attest collects, in
// go-tpm-tools' own form. It is a separate module because that verifier brings along
// the libraries of confidential machines.
package interop
