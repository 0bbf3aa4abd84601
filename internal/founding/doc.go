// Package founding makes the first keyring of a cluster: a fresh KEK, sealed to this
// machine's TPM, or wrapped by the wrappers that the configuration names instead, and
// wrapped for a recovery identity.
package founding
