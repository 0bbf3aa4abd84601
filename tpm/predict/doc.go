// Package predict computes the event log of a boot that has not happened yet: the log of the
// running boot, changed by the files that an update replaces. The predicted log yields, as
// any log does, the PCR values of the next boot, their explanation and a boot policy. The
// package takes bytes and returns values; it opens nothing.
//
// A wrong prediction makes a slot that never opens. A refused prediction has remedies: a
// signed boot state, a suspension, or resealing after the boot. So [Predict] refuses
// everything that it does not understand. Before it replaces an event, it recognises the
// event's role: by a digest that it recomputes if the data can be known, else by the only
// place in the sequence that the role can have. If the caller provides files of the running
// boot as well, Predict first predicts the running boot from them, and demands that the
// result equals the log, digest by digest.
//
// The package's knowledge of other programs (firmware, systemd-stub, GRUB, Linux's EFI stub)
// comes from their sources and logs; the comments name the versions. An unknown version is
// refused if its behaviour could matter.
package predict
