// Package tpm speaks to one TPM 2.0: it seals KEKs to it, quotes its PCRs and
// is kleidi's TPM wrapper.
//
// A [Device] is opened for an operation and closed after it. All sessions that
// carry a key are salted to the storage root key whose Name the slot records
// and encrypt their parameters, so that who listens on the bus, or answers in
// the TPM's place, learns nothing.
//
// What the TPM itself enforces before it unseals is an authorization policy,
// computed by package authpolicy.
package tpm
