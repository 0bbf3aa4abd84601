// Package vault runs the Vault wrapper against a real Vault core: with each auth
// method, with the least-privilege rules that docs/vault.md shows, and with every
// fault that a real server can be made to show.
package vault
