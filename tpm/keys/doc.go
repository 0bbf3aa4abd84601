// Package keys has the keys of a TPM 2.0: its storage root key ([WithSRK]), its
// endorsement key ([WithEK]), attestation keys ([WithAK]) and the quotes that they sign,
// and how to load the objects that were made below the storage root key.
//
// Keys are loaded for the duration of a function, and flushed on every path.
package keys
