// Package bootstate reads, makes and verifies signed boot states.
//
// A TPM slot may be sealed once to an operator's public key instead of to PCR values
// (TPM2_PolicyAuthorize). Every boot state that the owner of the key signs then opens
// the slot, without any change to the slot. A new kernel needs only a new signature,
// which is made on another machine.
//
// The signature does not cover the PCR values themselves but the digest of one
// TPM2_PolicyPCR over them. So it reveals no more than whether a given boot state is
// meant, and the TPM itself checks it. A policyRef binds signatures to a cluster and a
// generation: see [Ref].
//
// The file has systemd's format. systemd-measure(1) signs it, ukify puts it into the
// .pcrsig section of a unified kernel image, and systemd-stub(7) hands it to the initrd
// as /.extra/tpm2-pcr-signature.json:
//
//	{"sha256":[{"pcrs":[11],"pkfp":"…","pol":"…","sig":"…"}],"sha384":[…]}
//
// pcrs are the PCRs of that bank; pkfp identifies the key, see [KeyFingerprint]; pol is
// the SHA-256 TPM2_PolicyPCR digest; sig is the signature over it. Two members are
// kleidi's own, and systemd ignores them: ref, the policyRef in hexadecimal, and what,
// a note for display. No signature covers the note.
package bootstate
