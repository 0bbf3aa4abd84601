// Package vault runs the Vault wrapper with a real Vault core: with each auth method,
// with the least-privilege rules in docs/vault.md, and with every fault that a real
// server can be made to show.
package vault
