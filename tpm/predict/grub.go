package predict

import (
	"slices"
	"strings"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// grubBoot holds the places of the events of a boot with GRUB, as indexes in the log.
type grubBoot struct {
	commands []grubCommand // of PCR 8, in order, without the kernel's command line
	linux    int           // in commands
	initrd   int           // in commands, or -1
	cmdline  int           // event of the kernel's command line
	files    []int         // events of PCR 9 with a file's name
	kernel   int           // event of PCR 9
	disk     int           // event of PCR 9, or -1
	loader   int           // the image before the kernel, or -1
	images   []int         // the kernel's in PCR 4
	options  int           // the EFI stub's events of PCR 9, or -1
	stubDisk int
}

// grubCommand is a command that GRUB ran, as its digest proves.
type grubCommand struct {
	at   int
	text string
}

func (c grubCommand) words() []string { return strings.Fields(c.text) }

const (
	grubPrefix    = "grub_cmd: "
	cmdlinePrefix = "kernel_cmdline: "
)

// grub replaces files that GRUB loads.
func (d *draft) grub(next, running Files) error {
	on, err := d.secureBoot()
	if err != nil {
		return err
	}
	boot, err := d.recogniseGRUB()
	if err != nil {
		return err
	}
	commands, err := d.configured(boot, next, running)
	if err != nil {
		return err
	}
	if err := boot.checkFiles(commands, next); err != nil {
		return err
	}
	if next.Kernel != nil {
		if len(boot.images) > 0 {
			err = d.kernel(next.Kernel, on, boot.loader, boot.images)
		} else if on {
			err = refuse(4, "Secure Boot is on, and the log has no image of the kernel")
		}
		if err != nil {
			return err
		}
		d.measure(boot.kernel, next.Kernel)
	}
	if next.Initrd != nil {
		if boot.disk < 0 {
			return refuse(9, "the running boot has not exactly one initrd")
		}
		d.measure(boot.disk, next.Initrd)
		if boot.stubDisk >= 0 {
			d.measure(boot.stubDisk, next.Initrd)
		}
	}
	d.say(boot, commands)
	return nil
}

// say replaces the commands that GRUB ran by those that it will run.
func (d *draft) say(boot *grubBoot, commands []string) {
	for i, c := range boot.commands {
		if commands[i] != c.text {
			d.measureText(c.at, []byte(commands[i]), []byte(grubPrefix+commands[i]+"\x00"))
		}
	}
	linux := strings.Fields(commands[boot.linux])
	if line := strings.Join(linux[1:], " "); commands[boot.linux] != boot.commands[boot.linux].text {
		d.measureText(boot.cmdline, []byte(line), []byte(cmdlinePrefix+line+"\x00"))
		d.slots[boot.kernel][0].UntrustedData = []byte(linux[1] + "\x00")
		if boot.options >= 0 {
			d.measure(boot.options, toUTF16Z("BOOT_IMAGE="+line))
		}
	}
	if boot.initrd >= 0 && boot.disk >= 0 {
		d.slots[boot.disk][0].UntrustedData = []byte(strings.Fields(commands[boot.initrd])[1] + "\x00")
	}
}

// checkFiles refuses a new configuration that names a file that the caller did not
// provide.
func (b *grubBoot) checkFiles(commands []string, next Files) error {
	was, is := b.commands[b.linux].words(), strings.Fields(commands[b.linux])
	if len(is) < 2 {
		return badChange("the new grub.cfg loads no kernel")
	}
	if was[1] != is[1] && next.Kernel == nil {
		return badChange("the new grub.cfg loads the kernel %s, which is not given", is[1])
	}
	if line := next.CommandLine; line != nil {
		args := strings.Join(is[2:], " ")
		if given := strings.Join(strings.Fields(*line), " "); given != args && given != "BOOT_IMAGE="+is[1]+" "+args {
			return badChange("grub.cfg gives the kernel another command line, %q; give the grub.cfg that has the new one", args)
		}
	}
	if b.initrd < 0 || commands[b.initrd] == b.commands[b.initrd].text {
		return nil
	}
	if now := strings.Fields(commands[b.initrd]); len(now) != 2 || next.Initrd == nil {
		return badChange("the new grub.cfg loads other initrds (%s); one can be predicted, if it is given", strings.Join(now[1:], " "))
	}
	return nil
}

// recogniseGRUB finds the role of each event that a new file may replace. It demands:
//
//   - Every event of PCR 8 is a command or the kernel's command line, proven by its
//     digest. Exactly one command loads a kernel, and at most one loads initrds. The
//     kernel's command line is the one in the command that loads it.
//   - Between such a command and the next one, PCR 9 has one file, of the name in the
//     command.
//   - The images of PCR 4 after the command are the kernel: all have the same digest. No
//     other image was loaded after GRUB.
//   - If the kernel's EFI stub measured its load options into PCR 9, their digest is
//     the command line's. If it measured its initrd, the digest is the file's.
func (d *draft) recogniseGRUB() (*grubBoot, error) {
	b := &grubBoot{linux: -1, initrd: -1, cmdline: -1, kernel: -1, disk: -1, loader: -1, options: -1, stubDisk: -1}
	if len(d.indexes(11, func(e eventlog.Event) bool { return e.Proves([]byte(".linux\x00")) })) > 0 {
		return nil, refuse(4, "GRUB started a unified kernel image")
	}
	for _, step := range []func(*draft) error{b.recogniseCommands, b.recogniseFiles, b.recogniseImages, b.recogniseStub} {
		if err := step(d); err != nil {
			return nil, err
		}
	}
	return b, nil
}

func (b *grubBoot) recogniseCommands(d *draft) error {
	line := ""
	for _, i := range d.indexes(8, anyEvent) {
		e := d.old.Events[i]
		data := strings.TrimSuffix(string(e.UntrustedData), "\x00")
		if text, ok := strings.CutPrefix(data, cmdlinePrefix); ok && e.Proves([]byte(text)) && b.cmdline < 0 {
			b.cmdline, line = i, text
			continue
		}
		text, ok := strings.CutPrefix(data, grubPrefix)
		if !ok || !e.Proves([]byte(text)) {
			return refuse(8, "%s: not a command of GRUB's that its digest proves", where(i, e))
		}
		word, _, _ := strings.Cut(text, " ")
		switch {
		case word == "linux" || word == "linuxefi":
			if b.linux >= 0 {
				return refuse(8, "GRUB loaded more than one kernel")
			}
			b.linux = len(b.commands)
		case word == "initrd" || word == "initrdefi":
			if b.initrd >= 0 {
				return refuse(8, "GRUB loaded initrds more than once")
			}
			b.initrd = len(b.commands)
		}
		b.commands = append(b.commands, grubCommand{i, text})
	}
	if b.linux < 0 || b.cmdline < 0 {
		return refuse(8, "the log does not show how GRUB loads the kernel")
	}
	c := b.commands[b.linux]
	if w := c.words(); len(w) < 2 || strings.Join(w[1:], " ") != line || strings.Join(w, " ") != c.text || b.cmdline < c.at {
		return refuse(8, "the kernel's command line is not that of GRUB's command")
	}
	return nil
}

func (b *grubBoot) recogniseFiles(d *draft) error {
	b.files = append(b.files, d.indexes(9, func(e eventlog.Event) bool { return e.UntrustedType == eventlog.IPL })...)
	one := func(command int) int {
		at, name := b.commands[command].at, b.commands[command].words()[1]
		end := len(d.old.Events)
		if command+1 < len(b.commands) {
			end = b.commands[command+1].at
		}
		found := -1
		for _, i := range b.files {
			if i < at || i > end || strings.TrimRight(string(d.old.Events[i].UntrustedData), "\x00") != name {
				continue
			}
			if found >= 0 {
				return -1
			}
			found = i
		}
		return found
	}
	if b.kernel = one(b.linux); b.kernel < 0 {
		return refuse(9, "the log does not show which file is the kernel")
	}
	if b.initrd >= 0 && len(b.commands[b.initrd].words()) == 2 {
		b.disk = one(b.initrd)
	}
	return nil
}

func (b *grubBoot) recogniseImages(d *draft) error {
	apps, err := d.applications()
	if err != nil {
		return err
	}
	for _, i := range apps {
		if i < b.commands[b.linux].at {
			b.loader = i
			continue
		}
		if len(b.images) > 0 && !d.sameDigests(d.old.Events[i], d.old.Events[b.images[0]]) {
			return refuse(4, "%s: GRUB loaded an image beside the kernel", where(i, d.old.Events[i]))
		}
		b.images = append(b.images, i)
	}
	if b.loader < 0 {
		return refuse(4, "the log does not show GRUB's image")
	}
	return nil
}

func (b *grubBoot) recogniseStub(d *draft) error {
	late := userspace(d.old)
	for _, i := range d.indexes(9, anyEvent) {
		e := d.old.Events[i]
		switch {
		case slices.Contains(b.files, i), i >= late && provesItself(e):
		case tagged(e) == tagLoadOptions && b.options < 0 && e.Proves(toUTF16Z("BOOT_IMAGE="+b.line())):
			b.options = i
		case tagged(e) == tagInitrd && b.stubDisk < 0 && b.disk >= 0 && d.sameDigests(e, d.old.Events[b.disk]):
			b.stubDisk = i
		default:
			return refuse(9, "%s: neither a file that GRUB read nor what its kernel got", where(i, e))
		}
	}
	return nil
}

// line is the kernel's command line as GRUB measured it, with the kernel's name.
func (b *grubBoot) line() string { return strings.Join(b.commands[b.linux].words()[1:], " ") }
