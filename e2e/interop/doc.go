// Package interop has others judge kleidi's evidence: go-tpm-tools' verifier,
// which knows nothing of kleidi, is given what package attest collects, in
// go-tpm-tools' own form. It is a module of its own because that verifier brings
// along the libraries of confidential machines.
package interop
