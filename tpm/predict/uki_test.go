package predict

import (
	"bytes"
	"slices"
	"testing"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/predict/predicttest"
)

// ukiFiles is what a test's unified kernel image is made of.
type ukiFiles struct {
	stub, kernel, osrel, cmdline, initrd string
	more                                 []predicttest.Section
	signer                               *predicttest.Signer // nil: not signed
}

var baseUKI = ukiFiles{stub: "252.39-1~deb12u1", kernel: "6.1.0-56-amd64", osrel: "ID=test\n", cmdline: "quiet root=/dev/sda1\n", initrd: "initrd one"}

func (u ukiFiles) linux() []byte { return predicttest.Kernel(u.kernel, "kernel "+u.kernel) }

func (u ukiFiles) sections() []predicttest.Section {
	s := []predicttest.Section{{Name: ".osrel", Content: []byte(u.osrel)}, {Name: ".cmdline", Content: []byte(u.cmdline)},
		{Name: ".initrd", Content: []byte(u.initrd)}}
	s = slices.DeleteFunc(append(s, u.more...), func(s predicttest.Section) bool { return len(s.Content) == 0 })
	return append(s, predicttest.Section{Name: ".linux", Content: u.linux()})
}

func (u ukiFiles) build(t testing.TB) []byte {
	image := predicttest.UKI(u.stub, u.sections()...)
	if u.signer != nil {
		image = sign(t, u.signer, image)
	}
	return image
}

// boot returns the log of a boot with the image, modelled on a real one: the
// sections that are named, in that order, and what the kernel got.
func (u ukiFiles) boot(t testing.TB, secureBoot bool, sections []string, line string, initrd []byte) *eventlog.Log {
	t.Helper()
	log := readLog(t, "uki-secureboot")
	trust(t, log, signers().ca.Cert)
	authorise(log, 0, "db", signers().ca.Cert)
	image := u.build(t)
	at := find(t, log, 4, "BOOTX64.EFI", 0)
	remeasure(log, at, predicttest.Hashed(image), resized(log.Events[at].UntrustedData, len(image)))
	first := find(t, log, 11, ".linux", 0)
	events := slices.Clone(log.Events[:first])
	for _, name := range sections {
		i := slices.IndexFunc(u.sections(), func(s predicttest.Section) bool { return s.Name == name })
		events = append(events,
			eventlog.Measure(log.Banks, 11, eventlog.IPL, append([]byte(name), 0), toUTF16Z(name)),
			eventlog.Measure(log.Banks, 11, eventlog.IPL, u.sections()[i].Content, toUTF16Z(name)))
	}
	if !secureBoot {
		data := resized(append(make([]byte, 24), 4, 0, 0, 0, 0, 0, 0, 0, 0x7f, 0xff, 4, 0), len(u.linux()))
		events = append(events, eventlog.Measure(log.Banks, 4, eventlog.EFIBootServicesApp, predicttest.Hashed(u.linux()), data))
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
