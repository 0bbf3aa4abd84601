// Package bootstate reads, makes and verifies signed boot states.
//
// A TPM slot may be sealed once to an operator's public key instead of to PCR
// values (TPM2_PolicyAuthorize). Whatever boot state that key's owner signs
// then opens the slot, without any change to the slot itself: a new kernel needs
// a new signature, made on another machine, and nothing from this one.
//
// What is signed is not the PCR values but the digest of one TPM2_PolicyPCR
// over them, so that a signature reveals no more than whether a given boot state
// is meant, and the TPM itself checks it. A policyRef binds signatures to a
// cluster and a generation: see [Ref].
//
// The file is the one that systemd-measure(1) signs, that ukify puts into the
// .pcrsig section of a unified kernel image, and that systemd-stub(7) hands to the
// initrd as /.extra/tpm2-pcr-signature.json:
//
//	{"sha256":[{"pcrs":[11],"pkfp":"…","pol":"…","sig":"…"}],"sha384":[…]}
//
// pcrs are the PCRs of that bank; pkfp names the key, see [KeyFingerprint]; pol is
// the SHA-256 TPM2_PolicyPCR digest; sig is the signature over it. Two members
// are ours, and systemd ignores them: ref, the policyRef in hexadecimal, and what,
// a note for people. No signature covers the note.
package bootstate
