// Package eventlog reads, writes, replays and explains measured-boot event logs: the
// firmware's crypto-agile log (binary_bios_measurements, TCG PC Client Platform
// Firmware Profile, "Spec ID Event03") and systemd's userspace log (tpm2-measure.log).
// It takes bytes and returns values; it opens nothing.
//
// # What a log proves
//
// A log is a mere claim until it replays. To replay, start from the reset value and
// extend digest by digest; the results must be exactly the PCR values that a TPM
// quoted. Then the digests and their order are proven, and nothing else. No digest of
// the TPM covers the type and the data of an event, so the fields are named
// UntrustedType and UntrustedData. Data is believable only if its own hash is the
// digest, which [Event.Proves] checks, and only if a digest of that bank was verified.
// Types are never believable.
//
// [Log.Verify] is the proof. [Log.SecureBoot] and [Log.BootType] recompute digests
// before they believe data. [Log.Summarize] and [Compare] make explanations for
// display, which decide nothing.
package eventlog
