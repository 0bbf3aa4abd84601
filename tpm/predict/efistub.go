package predict

import (
	"bytes"
	"strings"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// efiStub replaces files of a kernel that the firmware, or a boot loader that
// leaves PCR 8 alone, starts by its own EFI stub:
//
//   - The last image of PCR 4 before the kernel measures anything is the kernel, and
//     none follows.
//   - PCR 9 has the kernel's load options and at most an initrd, and nothing else
//     of the firmware's time.
//
// It can replace the command line only if the running command line is given, which shows the
// encoding. It can replace the initrd if the running initrd is given, or if the command line
// names exactly one; else the kernel may have appended others to it.
func (d *draft) efiStub(next, running Files) error {
	on, err := d.secureBoot()
	if err != nil {
		return err
	}
	options, disk := d.kernelsOwn()
	apps, err := d.applications()
	if err != nil {
		return err
	}
	first := options
	if disk >= 0 && disk < first || first < 0 {
		first = disk
	}
	if len(apps) == 0 || apps[len(apps)-1] > first {
		return refuse(4, "the kernel is not the last image that was loaded")
	}
	if next.Kernel != nil {
		kernel := apps[len(apps)-1]
		loader := -1
		if len(apps) > 1 {
			loader = apps[len(apps)-2]
		}
		if err := d.kernel(next.Kernel, on, loader, []int{kernel}); err != nil {
			return err
		}
	}
	d.startedWith(options, disk, next, running)
	return nil
}

// startedWith replaces the kernel's measurements of its command line and its initrd.
func (d *draft) startedWith(options, disk int, next, running Files) {
	encode := d.encoding(options, running.CommandLine)
	if next.CommandLine != nil {
		d.bootEntry(running.CommandLine)
		if encode == nil {
			d.lose(9, "the running boot's load options are not its command line, in a known encoding")
		} else {
			d.measure(options, encode(*next.CommandLine))
		}
	}
	if next.Initrd == nil {
		return
	}
	single := encode != nil && strings.Count(" "+*running.CommandLine, " initrd=") == 1
	switch {
	case disk < 0:
		d.lose(9, "the running boot has no initrd")
	case running.Initrd == nil && !single:
		d.lose(9, "the running initrd is not given, and the command line does not name exactly one")
	default:
		d.measure(disk, next.Initrd)
	}
}

// kernelsOwn finds the events by which the kernel measured its load options and its initrd;
// -1 stands for none. Any other event of PCR 9 loses that PCR.
func (d *draft) kernelsOwn() (options, disk int) {
	options, disk = -1, -1
	late := userspace(d.old)
	for _, i := range d.indexes(9, anyEvent) {
		switch e := d.old.Events[i]; {
		case tagged(e) == tagLoadOptions && options < 0 && i < late:
			options = i
		case tagged(e) == tagInitrd && disk < 0 && i < late:
			disk = i
		case i >= late && provesItself(e):
		default:
			d.lose(9, "%s: neither the kernel's load options nor its initrd", where(i, e))
		}
	}
	return options, disk
}

// applications returns the images of PCR 4 that were loaded in order to be started. Any other
// event there must have measured its own data, as separators and actions do.
func (d *draft) applications() ([]int, error) {
	var apps []int
	late := userspace(d.old)
	for _, i := range d.indexes(4, anyEvent) {
		switch e := d.old.Events[i]; {
		case i < late && isApplication(e):
			apps = append(apps, i)
		case provesItself(e):
		default:
			return nil, refuse(4, "%s: not an image that was started, nor an action or a separator", where(i, e))
		}
	}
	return apps, nil
}

// kernel replaces the kernel's image in each of its events of PCR 4.
func (d *draft) kernel(file []byte, secureBoot bool, loader int, at []int) error {
	img, err := parsePE(file)
	if err != nil {
		return badFile("kernel: %v", err)
	}
	if secureBoot {
		if err := d.authorised(img, loader, at[0]); err != nil {
			return err
		}
	}
	for _, i := range at {
		d.image(i, img)
	}
	if len(d.indexes(9, func(e eventlog.Event) bool { return tagged(e) != 0 })) > 0 && !measuresLoad(file) {
		d.lose(9, "it is not known what the EFI stub of the new kernel measures")
	}
	return nil
}

// image replaces the image that an event of PCR 4 measures.
func (d *draft) image(i int, img *image) {
	d.measure(i, img.hashed...)
	d.slots[i][0].UntrustedData = resized(d.slots[i][0].UntrustedData, len(img.file))
}

// encoding returns the encoding of the running command line in the load options, or nil
// if the load options do not contain it.
func (d *draft) encoding(options int, running *string) func(string) []byte {
	if options < 0 || running == nil {
		return nil
	}
	for _, encode := range []func(string) []byte{toUTF16Z, toUTF16} {
		if d.old.Events[options].Proves(encode(*running)) {
			return encode
		}
	}
	return nil
}

// bootEntry loses the PCRs that hold the command line in another form: PCR 1 with the
// firmware's boot entry, and PCR 12 with a boot loader's own measurement.
func (d *draft) bootEntry(running *string) {
	late := userspace(d.old)
	if len(d.indexes(12, anyEvent)) > 0 && d.indexes(12, anyEvent)[0] < late {
		d.lose(12, "a boot loader measured the command line")
	}
	for _, i := range d.indexes(1, anyEvent) {
		if running == nil || bytes.Contains(d.old.Events[i].UntrustedData, toUTF16(*running)) {
			d.lose(1, "the firmware's boot entry may hold the command line")
		}
	}
}
