// Package eventlog reads, writes, replays and explains measured-boot event
// logs: the firmware's crypto-agile log (binary_bios_measurements, TCG PC
// Client Platform Firmware Profile, "Spec ID Event03") and systemd's userspace
// log (tpm2-measure.log). It takes bytes and returns values; it opens nothing.
//
// # What a log proves
//
// A log is hearsay until it replays: starting from the reset value and
// extending digest by digest must give exactly the PCR values that a TPM
// quoted. Then the digests, and their order, are proven, and nothing else.
// The type and the data of an event are not covered by any digest of the TPM's,
// so they are named UntrustedType and UntrustedData. Data becomes believable
// only where its own hash is the digest, which [Event.Proves] checks, and even
// then only if a digest of that bank was verified. Types never do.
//
// [Log.Verify] is the proof; [Log.SecureBoot] and [Log.BootType] recompute
// digests before they believe data; [Log.Summarize] and [Compare] are
// explanations for people and decide nothing.
package eventlog
