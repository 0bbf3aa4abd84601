package predict

import (
	"slices"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// ukiBoot holds the places of the events of a boot with a UKI, as indexes in the log.
type ukiBoot struct {
	secureBoot bool
	loader     int // the image that was loaded before the UKI, or -1
	image      int
	inner      int // the kernel inside it, if the firmware loaded that, or -1
	// measured are the names of the sections in PCR 11; names and data are the events of
	// their names and contents.
	measured      []string
	names, data   []int
	options, disk int // load options and initrd in PCR 9, or -1
	// extras says that the boot loader, or files beside the image, added to the command
	// line or the initrd.
	extras bool
}

// uki replaces the unified kernel image.
func (d *draft) uki(next Files, running Files) error {
	img, err := parsePE(next.UKI)
	if err != nil {
		return badFile("unified kernel image: %v", err)
	}
	if err := payload(img); err != nil {
		return err
	}
	boot, err := d.recogniseUKI()
	if err != nil {
		return err
	}
	var present *image
	if running.UKI != nil {
		if present, err = parsePE(running.UKI); err != nil {
			return badFile("running unified kernel image: %v", err)
		}
	}
	stub, err := stubOf(img, present, boot.measured)
	if err != nil {
		return err
	}
	if boot.secureBoot {
		if err := d.authorised(img, boot.loader, boot.image); err != nil {
			return err
		}
	}
	d.image(boot.image, img)
	if err := d.innerKernel(img, boot); err != nil {
		return err
	}
	d.sections(img, stub, boot)
	d.ownCommandLine(img, boot)
	d.handedOver(img, stub, boot, running.UKI != nil)
	return nil
}

// recogniseUKI finds the role of each event that a new UKI replaces. It demands:
//
//   - PCR 11 begins with the sections in the canonical order, each a name that its digest
//     proves, and a content. The other events are words that their digests prove, as
//     systemd-pcrphase measures them.
//   - The last image of PCR 4 before the sections is the UKI. The kernel inside the UKI
//     follows them if and only if Secure Boot is off: otherwise systemd-stub suspends the
//     firmware's verification, and thereby its measurement.
//   - PCR 9 has at most the kernel's load options and initrd.
//   - Additions to the command line or the initrd are measured into PCR 12 or 13 before
//     user space starts.
func (d *draft) recogniseUKI() (*ukiBoot, error) {
	on, err := d.secureBoot()
	if err != nil {
		return nil, err
	}
	b := &ukiBoot{secureBoot: on, loader: -1, inner: -1, options: -1, disk: -1}
	if err := b.recogniseSections(d); err != nil {
		return nil, err
	}
	if err := b.recogniseImages(d); err != nil {
		return nil, err
	}
	b.recogniseHandover(d)
	return b, nil
}

func (b *ukiBoot) recogniseSections(d *draft) error {
	at := d.indexes(11, anyEvent)
	last := -1
	for len(at) >= 2 {
		e := d.old.Events[at[0]]
		i := slices.IndexFunc(canonical, func(name string) bool { return e.Proves(append([]byte(name), 0)) })
		if i < 0 {
			break
		}
		if i <= last {
			return refuse(11, "%s: the section %s is not where systemd-stub measures it", where(at[0], e), canonical[i])
		}
		last = i
		b.measured = append(b.measured, canonical[i])
		b.names, b.data = append(b.names, at[0]), append(b.data, at[1])
		at = at[2:]
	}
	if len(b.measured) == 0 || b.measured[0] != ".linux" {
		return refuse(11, "the log does not begin with the section .linux")
	}
	for _, i := range at {
		if e := d.old.Events[i]; !provesItself(e) {
			return refuse(11, "%s: neither a section nor a phase of user space", where(i, e))
		}
	}
	return nil
}

func (b *ukiBoot) recogniseImages(d *draft) error {
	apps, err := d.applications()
	if err != nil {
		return err
	}
	first, end := b.names[0], b.data[len(b.data)-1]
	split := 0
	for split < len(apps) && apps[split] < first {
		split++
	}
	before, after := apps[:split], apps[split:]
	if len(after) > 0 && after[0] < end {
		return refuse(4, "an image was loaded while the sections were measured")
	}
	if len(before) == 0 {
		return refuse(4, "the log has no image before the sections")
	}
	b.image = before[len(before)-1]
	if len(before) > 1 {
		b.loader = before[len(before)-2]
	}
	switch {
	case b.secureBoot && len(after) == 0:
	case !b.secureBoot && len(after) == 1:
		b.inner = after[0]
	default:
		return refuse(4, "%d images were loaded after the unified kernel image; a known systemd-stub loads its kernel through the firmware if Secure Boot is off, and only then", len(after))
	}
	return nil
}

func (b *ukiBoot) recogniseHandover(d *draft) {
	b.options, b.disk = d.kernelsOwn()
	late := userspace(d.old)
	for _, pcr := range []int{12, 13} {
		for _, i := range d.indexes(pcr, anyEvent) {
			b.extras = b.extras || i < late
		}
	}
}

// innerKernel replaces the kernel that the firmware loads from inside the UKI.
func (d *draft) innerKernel(img *image, boot *ukiBoot) error {
	if boot.inner < 0 {
		return nil
	}
	kernel, err := parsePE(img.content(".linux"))
	if err != nil {
		return badFile("the kernel in the unified kernel image: %v", err)
	}
	d.image(boot.inner, kernel)
	return nil
}

// sections replaces the present sections by those of the new image.
func (d *draft) sections(img *image, s stub, boot *ukiBoot) {
	var events []eventlog.Event
	for _, name := range s.sections {
		content := img.content(name)
		if len(content) == 0 {
			continue
		}
		e := eventlog.Event{PCR: 11, UntrustedType: eventlog.IPL, UntrustedData: toUTF16Z(name)}
		e.Digests = d.digests(append([]byte(name), 0))
		events = append(events, e)
		e.Digests = d.digests(content)
		events = append(events, e)
	}
	for i := range boot.names {
		d.slots[boot.names[i]], d.slots[boot.data[i]] = nil, nil
	}
	d.slots[boot.names[0]] = events
}

// ownCommandLine loses PCR 12 if it may depend on the image's command line. Some boot loaders
// pass the image's own command line on and measure it. And with Secure Boot on, a stub
// neither uses nor measures the boot entry's command line if the image has its own.
func (d *draft) ownCommandLine(img *image, boot *ukiBoot) {
	line := img.content(".cmdline")
	at := slices.Index(boot.measured, ".cmdline")
	had, has := at >= 0, len(line) > 0
	switch {
	case had && has && d.old.Events[boot.data[at]].Proves(line), !had && !has:
	case boot.secureBoot && had && !has:
		d.lose(12, "the new image has no command line of its own")
		d.lose(9, "the new image has no command line of its own")
	case boot.extras:
		d.lose(12, "it is not known whether what was measured there depends on the image's command line")
	}
}

// handedOver replaces the kernel's measurements of its command line and its initrd.
func (d *draft) handedOver(img *image, s stub, boot *ukiBoot, proven bool) {
	if boot.options < 0 && boot.disk < 0 {
		return
	}
	line, ok := commandLine(img.content(".cmdline"))
	parts := s.initrd(img)
	switch {
	case s.initrds == nil:
		d.lose(9, "it is not known what systemd-stub %s adds to the initrd", s.version)
	case boot.extras:
		d.lose(9, "PCR 12 or 13 shows that more than the image's own command line and initrd reached the kernel")
	case !measuresLoad(img.content(".linux")):
		d.lose(9, "it is not known what the EFI stub of the new kernel measures")
	case !ok || boot.options < 0:
		d.lose(9, "it is not certain what command line the kernel gets")
	case (len(parts) > 0) != (boot.disk >= 0):
		d.lose(9, "the new image has an initrd or the running one has, not both")
	case !proven && boot.disk >= 0 && !d.sameAsSection(boot, ".initrd", boot.disk):
		d.lose(9, "the kernel got another initrd than the image's own; the running image would tell what was added")
	default:
		d.measure(boot.options, toUTF16Z(line))
		if boot.disk >= 0 {
			d.measure(boot.disk, parts...)
		}
	}
}

// sameAsSection reports whether an event measured the content of a section.
func (d *draft) sameAsSection(boot *ukiBoot, name string, i int) bool {
	at := slices.Index(boot.measured, name)
	return at >= 0 && d.sameDigests(d.old.Events[boot.data[at]], d.old.Events[i])
}
