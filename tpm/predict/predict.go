package predict

import (
	"fmt"
	"slices"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// MaxFile bounds each file of a boot, in bytes. Files are taken as bytes and
// never copied: real unified kernel images have 20 to 300 MB, so a caller may map
// the file into memory instead of reading it.
const MaxFile = 1 << 30

// Files are the files of a boot; nil stands for a file that is not given.
type Files struct {
	// UKI is a unified kernel image as on the EFI system partition, with its signature
	// if it has one.
	UKI []byte
	// Kernel and Initrd are the files that GRUB or the firmware loads, on machines
	// without a UKI.
	Kernel, Initrd []byte
	// GRUBConfig is the grub.cfg of that boot.
	GRUBConfig []byte
	// CommandLine is the kernel's command line as in /proc/cmdline, without the final
	// newline.
	CommandLine *string
}

// Change describes the changes of the next boot.
type Change struct {
	// Next are the files that replace the present ones. A nil file does not change.
	Next Files
	// Dbx is either the next content of the dbx variable (EFI_SIGNATURE_LISTs) or a
	// signed update (EFI_VARIABLE_AUTHENTICATION_2). The firmware appends the entries
	// of an update that dbx does not have yet.
	Dbx []byte
	// Running are files of the running boot, as far as the caller has them. They prove
	// that Predict understands the log. Without them it can predict neither a changed
	// GRUB configuration nor a changed command line of an EFI stub kernel.
	Running Files
	// PCRs are the PCRs that must be predicted. The result leaves out the events of
	// other PCRs that cannot be predicted. Nil stands for the PCRs that decide a boot of
	// the log's type, [eventlog.BootType.PCRs].
	PCRs []int
}

// Hints of refusals.
const (
	hintFile   = "check that it is the right file, whole and signed"
	hintChange = "name the files that this machine boots with"
)

func badFile(format string, args ...any) error {
	return &Refusal{PCR: -1, Reason: fmt.Sprintf(format, args...), Hint: hintFile}
}

func badChange(format string, args ...any) error {
	return &Refusal{PCR: -1, Reason: fmt.Sprintf(format, args...), Hint: hintChange}
}

// Predict returns the log of the next boot, provided that nothing changes but what change
// names. log must be the log of the running boot, verified by [eventlog.Log.Verify]. The
// result has the computable banks. It shares memory with log and change, so the caller must
// not modify these. An error wraps a [*Refusal].
//
// Predict works in this order:
//
//  1. It finds the boot type in the log, and refuses files that such a boot does not
//     have.
//  2. If running files are given, it predicts the running boot from them. Each digest
//     must equal the one in the log.
//  3. It replaces the digests that depend on the next dbx and files, each in an event
//     whose role it recognised.
//  4. It refuses if a demanded PCR could not be predicted, and drops the events of other
//     PCRs that could not.
func Predict(log *eventlog.Log, change Change) (*eventlog.Log, error) {
	if err := change.check(log); err != nil {
		return nil, err
	}
	d := newDraft(log)
	if change.Running.any() {
		if err := d.prove(change.Running); err != nil {
			return nil, err
		}
	}
	if change.Dbx != nil {
		if err := d.dbx(change.Dbx); err != nil {
			return nil, err
		}
	}
	if err := d.apply(change.Next, change.Running); err != nil {
		return nil, err
	}
	pcrs := change.PCRs
	if pcrs == nil {
		next := &eventlog.Log{Banks: d.banks, Events: d.events()}
		pcrs = slices.Concat(log.BootType().PCRs(log), next.BootType().PCRs(next))
	}
	return d.finish(pcrs)
}

func (f Files) any() bool {
	return f.UKI != nil || f.Kernel != nil || f.Initrd != nil || f.GRUBConfig != nil || f.CommandLine != nil
}

// check refuses files that are too large, and files that a boot of this type does not have.
func (c Change) check(log *eventlog.Log) error {
	for _, f := range []Files{c.Next, c.Running} {
		for _, b := range [][]byte{f.UKI, f.Kernel, f.Initrd, f.GRUBConfig} {
			if len(b) > MaxFile {
				return badFile("a file of %d bytes, more than %d", len(b), MaxFile)
			}
		}
	}
	n := c.Next
	if !n.any() && c.Dbx == nil {
		return badChange("nothing is named that changes")
	}
	t := log.BootType()
	switch {
	case !n.any():
	case t == eventlog.BootUKI && (n.Kernel != nil || n.Initrd != nil || n.GRUBConfig != nil || n.CommandLine != nil):
		return badChange("this machine boots a unified kernel image, which holds kernel, initrd and command line")
	case t != eventlog.BootUKI && n.UKI != nil:
		return badChange("this machine does not boot a unified kernel image (boot type %s)", t)
	case t == eventlog.BootEFIStub && n.GRUBConfig != nil:
		return badChange("this machine does not boot with GRUB")
	case t == eventlog.BootUnknown:
		return refuse(-1, "the log shows none of the ways to boot that are known")
	}
	return nil
}

// secureBoot reports whether Secure Boot is on, which decides what else is measured.
func (d *draft) secureBoot() (on bool, err error) {
	switch state := d.old.SecureBootState(); state {
	case eventlog.SecureBootOn, eventlog.SecureBootOff:
		return state == eventlog.SecureBootOn, nil
	case eventlog.SecureBootIdle:
		return false, refuse(7, "Secure Boot is on, and the log has no proven authority by which anything was verified")
	default:
		return false, refuse(7, "the log leaves it open whether Secure Boot is on")
	}
}

// prove predicts the running boot from its own files. It loses the PCRs whose prediction
// differs from the log.
func (d *draft) prove(running Files) error {
	same := newDraft(d.old)
	if err := same.apply(running, running); err != nil {
		return fmt.Errorf("running boot: %w", err)
	}
	for pcr := range eventlog.NumPCRs {
		if same.unknown[pcr] == nil && !slices.EqualFunc(ofPCR(d.events(), pcr), ofPCR(same.events(), pcr), d.sameDigests) {
			d.lose(pcr, "the running boot's own files do not lead to its event log, so that the log is not understood")
		}
	}
	return nil
}

// apply replaces the events that depend on the next files.
func (d *draft) apply(next, running Files) error {
	switch t := d.old.BootType(); {
	case !next.any():
		return nil
	case t == eventlog.BootUKI:
		if next.UKI == nil { // the image holds every other file of such a boot
			return nil
		}
		return d.uki(next, running)
	case t == eventlog.BootGRUB:
		return d.grub(next, running)
	case t == eventlog.BootEFIStub:
		return d.efiStub(next, running)
	default:
		return refuse(-1, "no files of a boot of type %s can be predicted", t)
	}
}

func ofPCR(events []eventlog.Event, pcr int) []eventlog.Event {
	var of []eventlog.Event
	for _, e := range events {
		if e.PCR == pcr && e.UntrustedType != eventlog.NoAction {
			of = append(of, e)
		}
	}
	return of
}
