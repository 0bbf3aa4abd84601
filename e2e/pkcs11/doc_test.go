// Package pkcs11 runs the whole kleidi as a process, with a key in a PKCS#11 token: the
// fault matrix, a rotation without the token, and a check that 10,000 wraps leave nothing
// behind.
package pkcs11
