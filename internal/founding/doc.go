// Package founding makes the first keyring of a cluster: a fresh KEK, sealed to this
// machine's TPM or wrapped by what the configuration names instead, and by a recovery
// identity.
package founding
