package predict

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/simboot/peimage"
)

// realConfig is the grub.cfg of the recorded boot, byte for byte.
const realConfig = "set timeout=0\nlinux /vmlinuz console=ttyS0,115200 quiet panic=-1 mboot=a\ninitrd /initrd.gz\nboot\n"

func grubLog(t testing.TB) *eventlog.Log { return readLog(t, "shim-grub-secureboot") }

// grubLogOf returns the recorded boot with another kernel, signed by the vendor's key
// that shim holds.
func grubLogOf(t testing.TB, kernel []byte) *eventlog.Log {
	log := grubLog(t)
	trust(t, log, signers().other.Cert, signers().ca.Cert)
	authorise(log, 0, "db", signers().ca.Cert)
	authorise(log, 1, "MokListRT", signers().vendor.Cert)
	setGRUBKernel(t, log, kernel)
	return log
}

func setGRUBKernel(t testing.TB, log *eventlog.Log, kernel []byte) {
	i := find(t, log, 9, "/vmlinuz", 0)
	remeasure(log, i, kernel, log.Events[i].UntrustedData)
	for i += 1; log.Events[i].PCR == 4; i++ {
		remeasure(log, i, peimage.Hashed(kernel), resized(log.Events[i].UntrustedData, len(kernel)))
	}
}

// setGRUBLine turns event i into a command or command line.
func setGRUBLine(log *eventlog.Log, i int, prefix, text string) {
	remeasure(log, i, []byte(text), []byte(prefix+text+"\x00"))
}

func TestGRUBInitrd(t *testing.T) {
	log, want := grubLog(t), grubLog(t)
	initrd := []byte("a rebuilt initrd")
	i := find(t, want, 9, "/initrd.gz", 0)
	remeasure(want, i, initrd, want.Events[i].UntrustedData)
	line := "BOOT_IMAGE=/vmlinuz console=ttyS0,115200 quiet panic=-1 mboot=a"
	for _, running := range []Files{{}, {GRUBConfig: []byte(realConfig), CommandLine: &line}} {
		got, err := Predict(log, Change{Next: Files{Initrd: initrd}, Running: running})
		if err != nil {
			t.Fatal(err)
		}
		wantSame(t, got, want)
	}
	_, err := Predict(log, Change{Next: Files{Initrd: initrd}, Running: Files{Initrd: initrd}})
	wantRefusal(t, err, "PCR 9", "own files do not lead")
}

func TestGRUBConfigurationAndCommandLine(t *testing.T) {
	log, want := grubLog(t), grubLog(t)
	changed := strings.Replace(realConfig, "quiet panic=-1 mboot=a", "panic=0", 1)
	line := "/vmlinuz console=ttyS0,115200 panic=0"
	remeasure(want, find(t, want, 9, "grub.cfg", 0), []byte(changed), []byte("(hd0,gpt1)/EFI/debian/grub.cfg\x00"))
	setGRUBLine(want, find(t, want, 8, "grub_cmd: linux", 0), "grub_cmd: ", "linux "+line)
	setGRUBLine(want, find(t, want, 8, "kernel_cmdline", 0), "kernel_cmdline: ", line)
	args, other := "console=ttyS0,115200 panic=0", "console=ttyS0,115200 panic=1"
	running := Files{GRUBConfig: []byte(realConfig)}
	got, err := Predict(log, Change{Next: Files{GRUBConfig: []byte(changed), CommandLine: &args}, Running: running})
	if err != nil {
		t.Fatal(err)
	}
	wantSame(t, got, want)
	for name, c := range map[string]struct {
		change Change
		says   string
	}{
		"no running configuration":    {Change{Next: Files{GRUBConfig: []byte(changed)}}, "the running grub.cfg is not given"},
		"another running one":         {Change{Next: Files{GRUBConfig: []byte(changed)}, Running: Files{GRUBConfig: []byte(changed)}}, "did not read"},
		"another command line":        {Change{Next: Files{GRUBConfig: []byte(changed), CommandLine: &other}, Running: running}, "another command line"},
		"command line alone":          {Change{Next: Files{CommandLine: &args}}, "another command line"},
		"another entry":               {Change{Next: Files{GRUBConfig: []byte(changed + "\n")}, Running: running}, "other entries"},
		"a changed setting":           {Change{Next: Files{GRUBConfig: []byte(strings.Replace(realConfig, "timeout=0", "timeout=1", 1))}, Running: running}, "line 1 "},
		"a variable in a changed one": {Change{Next: Files{GRUBConfig: []byte(strings.Replace(realConfig, "mboot=a", "$more", 1))}, Running: running}, "line 2 "},
		"a kernel that is not given":  {Change{Next: Files{GRUBConfig: []byte(strings.Replace(realConfig, "/vmlinuz", "/vmlinuz-2", 1))}, Running: running}, "/vmlinuz-2"},
		"an initrd that is not given": {Change{Next: Files{GRUBConfig: []byte(strings.Replace(realConfig, "/initrd.gz", "/initrd-2", 1))}, Running: running}, "/initrd-2"},
		"two initrds":                 {Change{Next: Files{GRUBConfig: []byte(strings.Replace(realConfig, "/initrd.gz", "/a /b", 1)), Initrd: []byte{1}}, Running: running}, "/a /b"},
		"a unified kernel image":      {Change{Next: Files{UKI: []byte("MZ")}}, "does not boot a unified kernel image"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Predict(log, c.change)
			wantRefusal(t, err, c.says)
		})
	}
}

func TestGRUBKernel(t *testing.T) {
	vendor := signers().vendor
	old := sign(t, vendor, peimage.Kernel("6.1.0-56-amd64", "old"))
	kernel := sign(t, vendor, peimage.Kernel("6.1.0-57-amd64", "new"))
	running := Files{Kernel: old, GRUBConfig: []byte(realConfig)}
	log, want := grubLogOf(t, old), grubLogOf(t, kernel)
	got, err := Predict(log, Change{Next: Files{Kernel: kernel}, Running: running})
	if err != nil {
		t.Fatal(err)
	}
	wantSame(t, got, want)

	// A kernel under a new name, with its initrd and configuration.
	changed := strings.NewReplacer("/vmlinuz", "/vmlinuz-57", "/initrd.gz", "/initrd-57").Replace(realConfig)
	line := "/vmlinuz-57 console=ttyS0,115200 quiet panic=-1 mboot=a"
	remeasure(want, find(t, want, 9, "grub.cfg", 0), []byte(changed), []byte("(hd0,gpt1)/EFI/debian/grub.cfg\x00"))
	setGRUBLine(want, find(t, want, 8, "grub_cmd: linux", 0), "grub_cmd: ", "linux "+line)
	setGRUBLine(want, find(t, want, 8, "kernel_cmdline", 0), "kernel_cmdline: ", line)
	setGRUBLine(want, find(t, want, 8, "grub_cmd: initrd", 0), "grub_cmd: ", "initrd /initrd-57")
	remeasure(want, find(t, want, 9, "/vmlinuz", 0), kernel, []byte("/vmlinuz-57\x00"))
	remeasure(want, find(t, want, 9, "/initrd", 0), []byte("initrd 57"), []byte("/initrd-57\x00"))
	got, err = Predict(log, Change{Next: Files{Kernel: kernel, Initrd: []byte("initrd 57"), GRUBConfig: []byte(changed)}, Running: running})
	if err != nil {
		t.Fatal(err)
	}
	wantSame(t, got, want)
}

func TestGRUBKernelOfAnotherSigner(t *testing.T) {
	kernel := peimage.Kernel("6.1.0-57-amd64", "new")
	log := grubLogOf(t, sign(t, signers().vendor, peimage.Kernel("6.1.0-56-amd64", "old")))
	_, err := Predict(log, Change{Next: Files{Kernel: kernel}})
	wantRefusal(t, err, "not signed")
	_, err = Predict(log, Change{Next: Files{Kernel: sign(t, signers().other, kernel)}}) // is in db, but was not measured
	wantRefusal(t, err, "PCR 7", "another authority")
	stranger, err := peimage.NewSigner("stranger", nil)
	if err != nil {
		t.Fatal(err)
	}
	_, err = Predict(log, Change{Next: Files{Kernel: sign(t, stranger, kernel)}})
	wantRefusal(t, err, "no authority")
	intermediate, err := peimage.NewSigner("leaf", signers().vendor)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Predict(log, Change{Next: Files{Kernel: sign(t, intermediate, kernel)}}); err != nil {
		t.Error(err)
	}
	tampered := sign(t, signers().vendor, kernel)
	tampered[0x1000] ^= 1
	_, err = Predict(log, Change{Next: Files{Kernel: tampered}})
	wantRefusal(t, err, "does not verify")
}

// A log that a known GRUB does not write is refused, even if it replays.
func TestGRUBLogsThatAreNotUnderstood(t *testing.T) {
	for name, c := range map[string]struct {
		change func(t *testing.T, log *eventlog.Log)
		says   string
	}{
		"a command that its digest does not prove": {func(t *testing.T, log *eventlog.Log) {
			log.Events[find(t, log, 8, "set timeout", 0)].UntrustedData = []byte("grub_cmd: set timeout=1\x00")
		}, "PCR 8"},
		"two kernels": {func(t *testing.T, log *eventlog.Log) {
			setGRUBLine(log, find(t, log, 8, "set timeout", 0), "grub_cmd: ", "linux /other")
		}, "more than one kernel"},
		"another command line than the command's": {func(t *testing.T, log *eventlog.Log) {
			setGRUBLine(log, find(t, log, 8, "kernel_cmdline", 0), "kernel_cmdline: ", "/vmlinuz init=/bin/sh")
		}, "command line is not that"},
		"the kernel's file under another name": {func(t *testing.T, log *eventlog.Log) {
			log.Events[find(t, log, 9, "/vmlinuz", 0)].UntrustedData = []byte("/other\x00")
		}, "which file is the kernel"},
		"two images of the kernel that differ": {func(t *testing.T, log *eventlog.Log) {
			i := find(t, log, 9, "/vmlinuz", 0) + 2
			remeasure(log, i, []byte("other"), log.Events[i].UntrustedData)
		}, "beside the kernel"},
		"an unknown event of PCR 4": {func(t *testing.T, log *eventlog.Log) {
			log.Events[find(t, log, 9, "/vmlinuz", 0)+2].UntrustedData = nil
		}, "PCR 4"},
		"an unknown event of PCR 9": {func(t *testing.T, log *eventlog.Log) {
			log.Events[find(t, log, 9, "/initrd.gz", 0)].UntrustedType = eventlog.EventTag
		}, "PCR 9"},
		"Secure Boot unknown": {func(t *testing.T, log *eventlog.Log) {
			log.Events[find(t, log, 7, "SecureBoot", 0)].UntrustedData = nil
		}, "whether Secure Boot is on"},
	} {
		t.Run(name, func(t *testing.T) {
			log := grubLog(t)
			c.change(t, log)
			_, err := Predict(log, Change{Next: Files{Initrd: []byte("new")}})
			wantRefusal(t, err, c.says)
		})
	}
}

// Later versions of GRUB start the kernel by its EFI stub, which makes its own
// measurements.
func TestGRUBThatStartsTheEFIStub(t *testing.T) {
	boot := func(line, initrd string) *eventlog.Log {
		log := grubLog(t)
		i := find(t, log, 9, "/initrd.gz", 0)
		remeasure(log, i, []byte(initrd), log.Events[i].UntrustedData)
		tag := readLog(t, "direct-kernel")
		options, disk := tag.Events[find(t, tag, 9, "LoadOptions", 0)], tag.Events[find(t, tag, 9, "Linux initrd", 0)]
		log.Events = slices.Insert(log.Events, find(t, log, 8, "grub_cmd: boot", 0)+1,
			eventlog.Measure(log.Banks, 9, eventlog.EventTag, toUTF16Z(line), options.UntrustedData),
			eventlog.Measure(log.Banks, 9, eventlog.EventTag, []byte(initrd), disk.UntrustedData))
		return log
	}
	const line = "BOOT_IMAGE=/vmlinuz console=ttyS0,115200 quiet panic=-1 mboot="
	want := boot(line+"b", "two")
	changed := strings.Replace(realConfig, "mboot=a", "mboot=b", 1)
	remeasure(want, find(t, want, 9, "grub.cfg", 0), []byte(changed), []byte("(hd0,gpt1)/EFI/debian/grub.cfg\x00"))
	setGRUBLine(want, find(t, want, 8, "grub_cmd: linux", 0), "grub_cmd: ", "linux "+line[len("BOOT_IMAGE="):]+"b")
	setGRUBLine(want, find(t, want, 8, "kernel_cmdline", 0), "kernel_cmdline: ", line[len("BOOT_IMAGE="):]+"b")
	change := Change{Next: Files{Initrd: []byte("two"), GRUBConfig: []byte(changed)}, Running: Files{GRUBConfig: []byte(realConfig)}}
	got, err := Predict(boot(line+"a", "one"), change)
	if err != nil {
		t.Fatal(err)
	}
	wantSame(t, got, want)
	_, err = Predict(boot(line+"other", "one"), change)
	wantRefusal(t, err, "PCR 9", "nor what its kernel got")
	log := boot(line+"a", "one")
	i := find(t, log, 9, "Linux initrd", 0)
	remeasure(log, i, []byte("one and more"), log.Events[i].UntrustedData)
	_, err = Predict(log, change)
	wantRefusal(t, err, "PCR 9", "nor what its kernel got")
}

// An entry of a submenu is chosen by names that may change with the configuration.
func TestGRUBSubmenu(t *testing.T) {
	log := grubLog(t)
	setGRUBLine(log, find(t, log, 8, "set timeout", 0), "grub_cmd: ", "setparams More")
	i := find(t, log, 8, "[ -e", 0)
	setGRUBLine(log, i, "grub_cmd: ", "setparams Debian")
	changed := strings.Replace(realConfig, "mboot=a", "mboot=b", 1)
	_, err := Predict(log, Change{Next: Files{GRUBConfig: []byte(changed)}, Running: Files{GRUBConfig: []byte(realConfig)}})
	wantRefusal(t, err, "PCR 8", "submenu")
}

// Menus are measured with their content.
func TestGRUBMenus(t *testing.T) {
	const config = `set default="0"
menuentry 'Debian' --class os {
	load_video
	echo	'Loading Linux 56 ...'
	linux	/vmlinuz-56 root=UUID=x ro  quiet
	initrd	/initrd-56
}
submenu 'More' {
	menuentry 'Debian, with Linux 56' $id 'gnulinux-56' {
		echo	'Loading Linux 56 ...'
		linux	/vmlinuz-56 root=UUID=x ro  quiet
		initrd	/initrd-56
	}
}
`
	lines := strings.Split(config, "\n")
	block := func(from, to int, config string) string {
		return strings.Join(strings.Split(config, "\n")[from:to], "\n")
	}
	commands := []string{"set default=0", "menuentry Debian --class os {\n" + block(2, 7, config), "submenu More {\n" + block(8, 14, config),
		"setparams Debian", "load_video", "echo Loading Linux 56 ...", "linux /vmlinuz-56 root=UUID=x ro quiet", "initrd /initrd-56"}
	next := strings.ReplaceAll(config, "56", "57")
	want := []string{"set default=0", "menuentry Debian --class os {\n" + block(2, 7, next), "submenu More {\n" + block(8, 14, next),
		"setparams Debian", "load_video", "echo Loading Linux 57 ...", "linux /vmlinuz-57 root=UUID=x ro quiet", "initrd /initrd-57"}
	c, err := compareConfig([]byte(config), []byte(next))
	if err != nil {
		t.Fatal(err)
	}
	for i := range commands {
		if got, err := c.rerun(commands[i]); err != nil || got != want[i] {
			t.Errorf("%q\nbecomes %q, %v\nwant %q", commands[i], got, err, want[i])
		}
	}
	for name, r := range map[string]struct {
		next    string
		command string
		says    string
	}{
		"the title of the chosen entry": {strings.Replace(config, "'Debian'", "'Debian 2'", 1), "setparams Debian", "title"},
		"the first line of a menu":      {strings.Replace(config, "'Debian'", "'Debian 2'", 1), commands[1], "line 2 "},
		"a menu from elsewhere":         {next, "menuentry Other {\n\tboot\n}", "not in the running grub.cfg"},
		"one line of two alike":         {strings.Replace(config, lines[4], strings.Replace(lines[4], "56", "57", 1), 1), commands[6], "more than once"},
	} {
		c, err := compareConfig([]byte(config), []byte(r.next))
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		_, err = c.rerun(r.command)
		wantRefusal(t, err, r.says)
	}
}

// The logs of two boots with menus by grub-mkconfig (Debian's GRUB 2.06, shim 16.1,
// OVMF): one file for each, with the real PCR 8. Kernel and initrd are too large to be
// kept, so others stand in for them.
func TestGRUBMenusOfRealBoots(t *testing.T) {
	config := func(name string) []byte {
		b, err := os.ReadFile("testdata/" + name + ".cfg")
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	kernels := map[string][]byte{
		"grub-menus-a": sign(t, signers().vendor, peimage.Kernel("6.1.0-56-amd64", "old")),
		"grub-menus-b": sign(t, signers().vendor, peimage.Kernel("6.1.0-57-amd64", "new")),
	}
	initrds := map[string][]byte{"grub-menus-a": []byte("old initrd"), "grub-menus-b": []byte("new initrd")}
	boot := func(name string) *eventlog.Log {
		log := readLog(t, name)
		trust(t, log, signers().ca.Cert)
		authorise(log, 0, "db", signers().ca.Cert)
		authorise(log, 1, "MokListRT", signers().vendor.Cert)
		setGRUBKernel(t, log, kernels[name])
		i := find(t, log, 9, "/initrd", 0)
		remeasure(log, i, initrds[name], log.Events[i].UntrustedData)
		return log
	}
	line := "console=ttyS0,115200 quiet panic=-1 mboot=b"
	next := Files{Kernel: kernels["grub-menus-b"], Initrd: initrds["grub-menus-b"], GRUBConfig: config("grub-menus-b"), CommandLine: &line}
	running := Files{Kernel: kernels["grub-menus-a"], Initrd: initrds["grub-menus-a"], GRUBConfig: config("grub-menus-a")}
	got, err := Predict(boot("grub-menus-a"), Change{Next: next, Running: running})
	if err != nil {
		t.Fatal(err)
	}
	wantSame(t, got, boot("grub-menus-b"))
}
