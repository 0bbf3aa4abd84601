// Package predict computes the event log of a boot that has not happened yet:
// that of the running boot, with the files that an update replaces. From the
// predicted log follow, as from any log, the PCR values of the next boot, their
// explanation and a boot policy. It takes bytes and returns values; it opens
// nothing.
//
// A wrong prediction is a slot that never opens, and a missing one has other
// remedies: a signed boot state, suspending, or resealing after the boot. So
// [Predict] refuses whatever it does not understand. Before it replaces an event
// it recognises the event's role, by a digest that it recomputes wherever the
// data can be known, else by the one place in the sequence that this role can
// have. Where it is given files of the running boot as well, it first predicts
// the running boot from them and demands that its log comes out, digest by
// digest.
//
// What it knows of other programs (firmware, systemd-stub, GRUB, Linux's EFI
// stub) was read in their sources or seen in their logs; the comments name the
// versions. A version that is not known is refused where it could matter.
package predict
