// Package credential binds a credential to one TPM: the PIN of a PKCS#11 token ([Seal])
// or the private key of a client certificate ([NewClientKey]). The file that holds it is
// useless to any other TPM, and to this one after a change of Secure Boot.
package credential
