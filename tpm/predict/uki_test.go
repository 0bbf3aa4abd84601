package predict

import (
	"bytes"
	"fmt"
	"slices"
	"testing"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/simboot/peimage"
)

// ukiFiles are the parts of a test's unified kernel image.
type ukiFiles struct {
	stub, kernel, osrel, cmdline, initrd string
	more                                 []peimage.Section
	signer                               *peimage.Signer // nil: not signed
}

var baseUKI = ukiFiles{stub: "252.39-1~deb12u1", kernel: "6.1.0-56-amd64", osrel: "ID=test\n", cmdline: "quiet root=/dev/sda1\n", initrd: "initrd one"}

func (u ukiFiles) linux() []byte { return peimage.Kernel(u.kernel, "kernel "+u.kernel) }

func (u ukiFiles) sections() []peimage.Section {
	s := []peimage.Section{{Name: ".osrel", Content: []byte(u.osrel)}, {Name: ".cmdline", Content: []byte(u.cmdline)},
		{Name: ".initrd", Content: []byte(u.initrd)}}
	s = slices.DeleteFunc(append(s, u.more...), func(s peimage.Section) bool { return len(s.Content) == 0 })
	return append(s, peimage.Section{Name: ".linux", Content: u.linux()})
}

func (u ukiFiles) build(t testing.TB) []byte {
	image := peimage.UKI(u.stub, u.sections()...)
	if u.signer != nil {
		image = sign(t, u.signer, image)
	}
	return image
}

// boot returns the log of a boot with the image, modelled on a real one: with the named
// sections, in that order, and with the command line and initrd that the kernel
// received.
func (u ukiFiles) boot(t testing.TB, secureBoot bool, sections []string, line string, initrd []byte) *eventlog.Log {
	t.Helper()
	log := readLog(t, "uki-secureboot")
	trust(t, log, signers().ca.Cert)
	authorise(log, 0, "db", signers().ca.Cert)
	image := u.build(t)
	at := find(t, log, 4, "BOOTX64.EFI", 0)
	remeasure(log, at, peimage.Hashed(image), resized(log.Events[at].UntrustedData, len(image)))
	first := find(t, log, 11, ".linux", 0)
	events := slices.Clone(log.Events[:first])
	for _, name := range sections {
		i := slices.IndexFunc(u.sections(), func(s peimage.Section) bool { return s.Name == name })
		events = append(events,
			eventlog.Measure(log.Banks, 11, eventlog.IPL, append([]byte(name), 0), toUTF16Z(name)),
			eventlog.Measure(log.Banks, 11, eventlog.IPL, u.sections()[i].Content, toUTF16Z(name)))
	}
	if !secureBoot {
		data := resized(append(make([]byte, 24), 4, 0, 0, 0, 0, 0, 0, 0, 0x7f, 0xff, 4, 0), len(u.linux()))
		events = append(events, eventlog.Measure(log.Banks, 4, eventlog.EFIBootServicesApp, peimage.Hashed(u.linux()), data))
	}
	log.Events = append(events, log.Events[first+8:]...)
	if !secureBoot {
		data := variable{globalVariable, "SecureBoot", []byte{0}}.encode()
		remeasure(log, find(t, log, 7, "SecureBoot", 0), data, data)
		log.Events = slices.DeleteFunc(log.Events, func(e eventlog.Event) bool { return e.UntrustedType == eventlog.EFIVariableAuthority })
	}
	for tag, measured := range map[string][]byte{"LoadOptions": toUTF16Z(line), "Linux initrd": initrd} {
		i := find(t, log, 9, tag, 0)
		remeasure(log, i, measured, log.Events[i].UntrustedData)
	}
	return log
}

var sections252 = []string{".linux", ".osrel", ".cmdline", ".initrd"}

func (u ukiFiles) boot252(t testing.TB, secureBoot bool) *eventlog.Log {
	return u.boot(t, secureBoot, sections252, string(bytes.TrimRight([]byte(u.cmdline), "\n")), []byte(u.initrd))
}

func TestUKI(t *testing.T) {
	next := baseUKI
	next.kernel, next.osrel, next.cmdline, next.initrd = "6.12.57+deb13-amd64", "ID=test\nVERSION_ID=2\n", "quiet  root=/dev/sda2", "another initrd"
	for name, secureBoot := range map[string]bool{"Secure Boot on": true, "Secure Boot off": false} {
		t.Run(name, func(t *testing.T) {
			base, next := baseUKI, next
			if secureBoot {
				base.signer, next.signer = signers().ca, signers().ca
			}
			running, want := base.boot252(t, secureBoot), next.boot252(t, secureBoot)
			for _, proof := range []Files{{}, {UKI: base.build(t)}} {
				got, err := Predict(running, Change{Next: Files{UKI: next.build(t)}, Running: proof, PCRs: []int{4, 7, 9, 11}})
				if err != nil {
					t.Fatal(err)
				}
				wantSame(t, got, want)
			}
			same, err := Predict(running, Change{Next: Files{UKI: base.build(t)}})
			if err != nil {
				t.Fatal(err)
			}
			wantSame(t, same, running)
			if _, err := Predict(running, Change{Next: Files{UKI: next.build(t)}, Running: Files{UKI: next.build(t)}}); err == nil {
				t.Error("another image passed for the running one")
			}
		})
	}
}

// Known versions of the stub measure different sections, and hand different
// archives to the kernel.
func TestStubVersions(t *testing.T) {
	more := []peimage.Section{
		{Name: ".uname", Content: []byte("6.1.0")}, {Name: ".sbat", Content: []byte("sbat,1\n")}, {Name: ".ucode", Content: []byte("micro")},
		{Name: ".pcrsig", Content: []byte("{}")}, {Name: ".pcrpkey", Content: []byte("-----BEGIN PUBLIC KEY-----\n")}, {Name: ".splash", Content: []byte("BM")},
	}
	archive := func(name, content string) string {
		folder := "070701" + "00000001" + "0000416d" + "0000000000000000" + "00000001" + "00000000" + "00000000" + "00000000000000000000000000000000" + "00000007" + "00000000" + ".extra\x00" + "\x00\x00\x00"
		file := "070701" + "00000002" + "00008124" + "0000000000000000" + "00000001" + "00000000" + hex8(len(content)) + "00000000000000000000000000000000" + hex8(len(".extra/"+name)+1) + "00000000" + ".extra/" + name + "\x00"
		return folder + pad(pad(file)+content) + cpioTrailer
	}
	sig, key := archive("tpm2-pcr-signature.json", "{}"), archive("tpm2-pcr-public-key.pem", "-----BEGIN PUBLIC KEY-----\n")
	for version, want := range map[string]struct {
		sections []string
		initrd   string
	}{
		"252.39-1~deb12u1": {[]string{".linux", ".osrel", ".cmdline", ".initrd", ".splash", ".pcrpkey"}, pad("initrd one") + sig + key},
		"257.9-1~deb13u1": {[]string{".linux", ".osrel", ".cmdline", ".initrd", ".ucode", ".splash", ".uname", ".sbat", ".pcrpkey"},
			pad("micro") + pad("initrd one") + sig + key + archive("os-release", "ID=test\n")},
	} {
		t.Run(version, func(t *testing.T) {
			base, next := baseUKI, baseUKI
			base.signer, next.signer, next.stub, next.more = signers().ca, signers().ca, version, more
			got, err := Predict(base.boot252(t, true), Change{Next: Files{UKI: next.build(t)}, PCRs: []int{4, 7, 9, 11}})
			if err != nil {
				t.Fatal(err)
			}
			want := next.boot(t, true, want.sections, "quiet root=/dev/sda1", []byte(want.initrd))
			wantSame(t, got, want)
			// The opposite update: only the running image explains the initrd.
			_, err = Predict(want, Change{Next: Files{UKI: base.build(t)}, PCRs: []int{9}})
			wantRefusal(t, err, "PCR 9", "another initrd than the image's own")
			got, err = Predict(want, Change{Next: Files{UKI: base.build(t)}, Running: Files{UKI: next.build(t)}, PCRs: []int{4, 7, 9, 11}})
			if err != nil {
				t.Fatal(err)
			}
			wantSame(t, got, base.boot252(t, true))
		})
	}
}

func hex8(n int) string   { return fmt.Sprintf("%08x", n) }
func pad(s string) string { return s + "\x00\x00\x00"[:-len(s)&3] }

// An unknown version is learned from the running boot.
func TestStubOfAnUnknownVersion(t *testing.T) {
	base := baseUKI
	base.stub, base.signer = "259.1", signers().ca
	base.more = []peimage.Section{{Name: ".uname", Content: []byte("6.1.0")}}
	next := base
	next.kernel = "6.1.0-57-amd64"
	sections := append(slices.Clone(sections252), ".uname")
	running, want := base.boot(t, true, sections, "x", []byte("y")), next.boot(t, true, sections, "x", []byte("y"))
	got, err := Predict(running, Change{Next: Files{UKI: next.build(t)}, Running: Files{UKI: base.build(t)}})
	if err != nil {
		t.Fatal(err)
	}
	wantSame(t, got, without(want, 9))
	_, err = Predict(running, Change{Next: Files{UKI: next.build(t)}, Running: Files{UKI: base.build(t)}, PCRs: []int{9}})
	wantRefusal(t, err, "PCR 9", "259.1")
	_, err = Predict(running, Change{Next: Files{UKI: next.build(t)}})
	wantRefusal(t, err, "PCR 11", "259.1")
	newer := next
	newer.stub = "259.2"
	_, err = Predict(running, Change{Next: Files{UKI: newer.build(t)}, Running: Files{UKI: base.build(t)}})
	wantRefusal(t, err, "PCR 11", "259.2")
	next.more = append(next.more, peimage.Section{Name: ".sbat", Content: []byte("sbat,1")})
	_, err = Predict(running, Change{Next: Files{UKI: next.build(t)}, Running: Files{UKI: base.build(t)}})
	wantRefusal(t, err, "PCR 11", ".sbat")
}

// Images whose measurements are uncertain, or that would not start.
func TestUKIsThatAreRefused(t *testing.T) {
	good := baseUKI
	good.signer = signers().ca
	running := good.boot252(t, true)
	build := func(stub string, sections ...peimage.Section) []byte {
		return sign(t, signers().ca, peimage.UKI(stub, sections...))
	}
	linux := peimage.Section{Name: ".linux", Content: good.linux()}
	cmdline := peimage.Section{Name: ".cmdline", Content: []byte("quiet")}
	unsigned, foreign := good, good
	unsigned.signer, foreign.signer = nil, signers().other
	broken := good.build(t)
	broken[0x1000] ^= 1
	overlapping := good.build(t)
	copy(overlapping[0x280+24+240+40+12:], overlapping[0x280+24+240+12:][:4]) // the second section's address
	hollow := good.build(t)
	hollow[0x280+24+240+2*40+8+1] = 0x10 // the third section's size in memory
	for name, c := range map[string]struct {
		image []byte
		says  string
	}{
		"larger in memory":        {hollow, "larger in memory"},
		"not an image":            {[]byte("MZ"), "not a PE image"},
		"cut off":                 {good.build(t)[:0x1800], "reaches beyond"},
		"no stub":                 {sign(t, signers().ca, peimage.Image(linux, cmdline)), "no systemd-stub"},
		"no kernel":               {build("252.1", cmdline), "no section .linux"},
		"two command lines":       {build("252.1", cmdline, linux, cmdline), "two sections .cmdline"},
		"profiles":                {build("257.1", cmdline, linux, peimage.Section{Name: ".profile", Content: []byte("x")}), ".profile"},
		"device trees to choose":  {build("257.1", cmdline, linux, peimage.Section{Name: ".dtbauto", Content: []byte("x")}), ".dtbauto"},
		"a name that 252 cuts":    {build("252.1", cmdline, linux, peimage.Section{Name: ".dtb2", Content: []byte("x")}), "taken for another"},
		"sections that overlap":   {overlapping, "overlap in memory"},
		"not signed":              {unsigned.build(t), "not signed"},
		"signed by somebody else": {foreign.build(t), "no authority"},
		"changed after signing":   {broken, "does not verify"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Predict(running, Change{Next: Files{UKI: c.image}})
			wantRefusal(t, err, c.says)
		})
	}
}

// PCRs that the next image leaves uncertain are refused only if they are demanded.
func TestCommandLineOfUKI(t *testing.T) {
	for _, c := range []struct {
		cmdline, line string
		ok            bool
	}{
		{"quiet\n", "quiet", true}, {"a\tb \n\n", "a b", true}, {"a\x00b", "a", true}, {"a  b", "a  b", true},
		{" quiet", "", false}, {"grün", "", false}, {"\n", "", false}, {"", "", false}, {"a\x7f", "", false},
	} {
		if line, ok := commandLine([]byte(c.cmdline)); ok != c.ok || ok && line != c.line {
			t.Errorf("%q: %q, %v", c.cmdline, line, ok)
		}
	}
	base := baseUKI
	base.signer = signers().ca
	for _, cmdline := range []string{"grün", ""} {
		next := base
		next.cmdline = cmdline
		_, err := Predict(base.boot252(t, true), Change{Next: Files{UKI: next.build(t)}, PCRs: []int{4, 9}})
		wantRefusal(t, err, "PCR 9")
	}
	old := base
	old.kernel = "5.10.0-1-amd64"
	_, err := Predict(base.boot252(t, true), Change{Next: Files{UKI: old.build(t)}, PCRs: []int{4, 9}})
	wantRefusal(t, err, "PCR 9", "EFI stub of the new kernel")
	// Without its own command line the image takes the boot entry's, so PCR 9 decides the
	// boot, as PCR 11 did before.
	next := base
	next.cmdline = ""
	_, err = Predict(base.boot252(t, true), Change{Next: Files{UKI: next.build(t)}})
	wantRefusal(t, err, "PCR 9")
	_, err = Predict(base.boot252(t, true), Change{Next: Files{UKI: next.build(t)}, PCRs: []int{12}})
	wantRefusal(t, err, "PCR 12")
}

func TestUKILogsThatAreNotUnderstood(t *testing.T) {
	base := baseUKI
	base.signer = signers().ca
	insert := func(log *eventlog.Log, at int, e eventlog.Event) { log.Events = slices.Insert(log.Events, at, e) }
	for name, c := range map[string]struct {
		change func(log *eventlog.Log)
		pcrs   []int
		says   string
	}{
		"a section out of order": {func(log *eventlog.Log) {
			i := find(t, log, 11, ".osrel", 0)
			remeasure(log, i, []byte(".sbat\x00"), toUTF16Z(".sbat"))
		}, nil, "not where systemd-stub measures it"},
		"an unknown section": {func(log *eventlog.Log) {
			i := find(t, log, 11, ".osrel", 0)
			remeasure(log, i, []byte(".other\x00"), toUTF16Z(".other"))
		}, nil, "neither a section nor a phase"},
		"another section first": {func(log *eventlog.Log) {
			i := find(t, log, 11, ".linux", 0)
			insert(log, i, eventlog.Measure(log.Banks, 11, eventlog.IPL, []byte("x"), []byte("y")))
		}, nil, "does not begin with"},
		"a second image": {func(log *eventlog.Log) {
			i := find(t, log, 9, "LoadOptions", 0)
			insert(log, i, log.Events[find(t, log, 4, "BOOTX64", 0)])
		}, nil, "1 images were loaded after"},
		"an image among the sections": {func(log *eventlog.Log) {
			i := find(t, log, 11, ".osrel", 0)
			insert(log, i, log.Events[find(t, log, 4, "BOOTX64", 0)])
		}, nil, "while the sections were measured"},
		"no kernel, without Secure Boot": {func(log *eventlog.Log) {
			data := variable{globalVariable, "SecureBoot", []byte{0}}.encode()
			remeasure(log, find(t, log, 7, "SecureBoot", 0), data, data)
		}, nil, "0 images were loaded after"},
		"no image": {func(log *eventlog.Log) {
			i := find(t, log, 4, "BOOTX64", 0)
			log.Events = slices.Delete(log.Events, i, i+1)
		}, nil, "no image before"},
		"a credential": {func(log *eventlog.Log) {
			i := find(t, log, 9, "LoadOptions", 0)
			insert(log, i, eventlog.Measure(log.Banks, 12, eventlog.IPL, []byte("x"), []byte("Credentials initrd")))
		}, []int{4, 9, 11}, "more than the image's own"},
		"a command line in PCR 12": {func(log *eventlog.Log) {
			i := find(t, log, 4, "BOOTX64", 0)
			insert(log, i, eventlog.Measure(log.Banks, 12, eventlog.IPL, toUTF16Z("other"), toUTF16Z("other")))
			remeasure(log, find(t, log, 11, ".cmdline", 1), []byte("other"), toUTF16Z(".cmdline"))
		}, []int{4, 11, 12}, "PCR 12"},
		"something else in PCR 9": {func(log *eventlog.Log) {
			i := find(t, log, 9, "LoadOptions", 0)
			insert(log, i, eventlog.Measure(log.Banks, 9, eventlog.IPL, []byte("x"), []byte("y")))
		}, []int{9}, "neither the kernel's load options nor"},
		"a second authority that is not proven": {func(log *eventlog.Log) {
			i := find(t, log, 4, "BOOTX64", 0)
			insert(log, i, eventlog.Measure(log.Banks, 7, eventlog.EFIVariableAuthority, []byte("x"), []byte("y")))
		}, nil, "not a proven authority"},
		"an authority that is not proven": {func(log *eventlog.Log) {
			for i := range log.Events {
				if log.Events[i].UntrustedType == eventlog.EFIVariableAuthority {
					log.Events[i].UntrustedData = nil
				}
			}
		}, nil, "no proven authority"},
		"a db that is not proven": {func(log *eventlog.Log) {
			i := find(t, log, 7, "db", 0)
			log.Events[i].UntrustedData = variable{securityDatabase, "db", nil}.encode()
		}, nil, "Secure Boot"},
	} {
		t.Run(name, func(t *testing.T) {
			log := base.boot252(t, true)
			c.change(log)
			_, err := Predict(log, Change{Next: Files{UKI: base.build(t)}, PCRs: c.pcrs})
			wantRefusal(t, err, c.says)
		})
	}
}

// Measurements of user space after the boot are carried over unchanged: the next boot
// makes the same ones.
func TestPhasesOfUserSpaceStay(t *testing.T) {
	base, next := baseUKI, baseUKI
	base.signer, next.signer, next.kernel = signers().ca, signers().ca, "6.1.0-57-amd64"
	running, want := base.boot252(t, true), next.boot252(t, true)
	for _, log := range []*eventlog.Log{running, want} {
		for _, pcr := range []int{4, 7, 9, 12} {
			log.Append([]eventlog.Event{eventlog.Measure(log.Banks, pcr, eventlog.EventTag, []byte("os-separator"), []byte("os-separator"))})
		}
		for _, phase := range []string{"enter-initrd", "leave-initrd", "sysinit", "ready"} {
			log.Append([]eventlog.Event{eventlog.Measure(log.Banks, 11, eventlog.EventTag, []byte(phase), []byte(phase))})
		}
	}
	got, err := Predict(running, Change{Next: Files{UKI: next.build(t)}, PCRs: []int{4, 7, 9, 11, 12}})
	if err != nil {
		t.Fatal(err)
	}
	wantSame(t, got, want)
}

// A boot loader that db authorised starts an image authorised by the same certificate.
func TestUKIBehindABootLoader(t *testing.T) {
	base, next := baseUKI, baseUKI
	base.signer, next.signer, next.initrd = signers().ca, signers().ca, "two"
	behind := func(log *eventlog.Log) *eventlog.Log {
		i := find(t, log, 4, "BOOTX64", 0)
		log.Events = slices.Insert(log.Events, i, eventlog.Measure(log.Banks, 4, eventlog.EFIBootServicesApp, []byte("systemd-boot"), log.Events[i].UntrustedData))
		return log
	}
	got, err := Predict(behind(base.boot252(t, true)), Change{Next: Files{UKI: next.build(t)}})
	if err != nil {
		t.Fatal(err)
	}
	wantSame(t, got, behind(next.boot252(t, true)))
	next.signer = signers().other
	_, err = Predict(behind(base.boot252(t, true)), Change{Next: Files{UKI: next.build(t)}})
	wantRefusal(t, err, "no authority")
}

// A bank that Go cannot compute is left out.
func TestBanksThatCannotBeComputed(t *testing.T) {
	base := baseUKI
	base.signer = signers().ca
	log := base.boot252(t, true)
	want := base.boot252(t, true)
	log.Banks = append(log.Banks, eventlog.SM3)
	for i := range log.Events {
		log.Events[i].Digests = append(log.Events[i].Digests, eventlog.Digest{Hash: eventlog.SM3, Value: make([]byte, 32)})
	}
	got, err := Predict(log, Change{Next: Files{UKI: base.build(t)}})
	if err != nil {
		t.Fatal(err)
	}
	wantSame(t, got, want)
	if !bytes.Equal(got.Encode(), want.Encode()) {
		t.Error("the log differs")
	}
}
