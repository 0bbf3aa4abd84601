package simboot

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/sha256"
	"encoding/binary"
	"strings"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/simboot/peimage"
)

// measurement is one event before hashing.
type measurement struct {
	pcr      int
	typ      eventlog.EventType
	measured []byte // the hashed bytes
	data     []byte // the data in the log
}

// sequence collects the measurements of one boot, in their order.
type sequence struct {
	boot   Boot
	files  *Files
	events []measurement
	err    error // the first certificate that could not be made
}

// measure returns the events of a boot as firmware, loader and kernel log them.
func measure(b Boot, f *Files, banks []crypto.Hash) ([]eventlog.Event, error) {
	s := &sequence{boot: b, files: f}
	s.firmware()
	s.secureBootVariables()
	s.bootVariables()
	s.add(4, eventlog.EFIAction, []byte("Calling EFI Application from Boot Option"))
	for pcr := range 7 { // PCR 7 already has its separator
		s.separator(pcr)
	}
	switch b.Loader {
	case UKI:
		s.uki()
	case GRUB:
		s.grub()
	case EFIStub:
		s.efiStub()
	case Direct:
		s.initrd(s.files.Initrd)
	}
	s.add(5, eventlog.EFIAction, []byte("Exit Boot Services Invocation"))
	s.add(5, eventlog.EFIAction, []byte("Exit Boot Services Returned with Success"))
	events := make([]eventlog.Event, len(s.events))
	for i, m := range s.events {
		events[i] = eventlog.Measure(banks, m.pcr, m.typ, m.measured, m.data)
	}
	return events, s.err
}

// add measures data itself.
func (s *sequence) add(pcr int, typ eventlog.EventType, data []byte) {
	s.addContent(pcr, typ, data, data)
}

// addContent measures content that the log only names.
func (s *sequence) addContent(pcr int, typ eventlog.EventType, measured, data []byte) {
	s.events = append(s.events, measurement{pcr, typ, measured, data})
}

func (s *sequence) separator(pcr int) { s.add(pcr, eventlog.Separator, make([]byte, 4)) }

// content stands for bytes of which only the digest is known. It is a function of its
// arguments.
func content(kind string, of ...string) []byte {
	h := sha256.New()
	for _, part := range append([]string{kind}, of...) {
		_ = binary.Write(h, binary.BigEndian, uint64(len(part)))
		h.Write([]byte(part))
	}
	return h.Sum(nil)
}

func (s *sequence) firmware() {
	// With Secure Boot off, some firmware has another build or another layout of its
	// volumes. The recorded firmware does, and so does this one.
	verify := "verifies"
	if !s.boot.SecureBoot {
		verify = "verifies nothing"
	}
	blob := func(base, size uint64, measured []byte) {
		data := binary.LittleEndian.AppendUint64(nil, base)
		data = binary.LittleEndian.AppendUint64(data, size)
		s.addContent(0, eventlog.EFIPlatformFirmwareBlob, measured, data)
	}
	s.add(0, eventlog.CRTMVersion, utf16z(s.boot.Firmware))
	blob(0x820000, 0xe0000, content("pei volume", s.boot.Firmware, verify))
	blob(0x900000, 0xc00000, content("dxe volume", s.boot.Firmware))
}

func (s *sequence) secureBootVariables() {
	enabled := []byte{0}
	if s.boot.SecureBoot {
		enabled[0] = 1
	}
	set := func(namespace guid, name string, value []byte) {
		s.add(7, eventlog.EFIVariableDriverConfig, variable(namespace, name, value))
	}
	set(guidGlobal, "SecureBoot", enabled)
	set(guidGlobal, "PK", s.keyList("Platform Key"))
	set(guidGlobal, "KEK", s.keyList("Key Exchange Key"))
	set(guidSecurity, "db", s.keyList("Signature Database Key"))
	set(guidSecurity, "dbx", s.files.Dbx)
	s.separator(7)
}

// cert returns the DER of one of the enrolled keys' certificates.
func (s *sequence) cert(name string) []byte {
	signer, err := signer(name)
	if err != nil {
		s.err = cmp.Or(s.err, err)
		return nil
	}
	return signer.Cert.Raw
}

func (s *sequence) keyList(role string) []byte {
	if s.boot.Keys == "" {
		return nil
	}
	return signatureList(guidX509, ownerGUID(s.boot.Keys), s.cert(s.boot.Keys+" "+role))
}

// authority measures the certificate that let the next image run.
func (s *sequence) authority(namespace guid, name string, value []byte) {
	if s.boot.SecureBoot {
		s.add(7, eventlog.EFIVariableAuthority, variable(namespace, name, value))
	}
}

func (s *sequence) dbAuthority() {
	owner := ownerGUID(s.boot.Keys)
	s.authority(guidSecurity, "db", append(owner[:], s.cert(s.boot.dbKey())...))
}

// bootVariables measures the boot variables by their value only, as
// EV_EFI_VARIABLE_BOOT does.
func (s *sequence) bootVariables() {
	set := func(name string, value []byte) {
		s.addContent(1, eventlog.EFIVariableBoot, value, variable(guidGlobal, name, value))
	}
	setup := append(mustHex("04071400c9bdb87cebf8344faaea3ee4af6516a10406140021aa2c4614760345836e8ab6f4662331"), pathEnd...)
	disk := append(append([]byte(nil), diskPath...), pathEnd...)
	set("BootOrder", []byte{1, 0, 0, 0})
	set("Boot0001", bootOption(1, "UEFI Misc Device", disk))
	set("Boot0000", bootOption(0x109, "UiApp", setup))
}

// image measures a started PE image by its Authenticode digest, which signing does not
// change.
func (s *sequence) image(file []byte, path ...[]byte) {
	s.addContent(4, eventlog.EFIBootServicesApp, peimage.Hashed(file),
		imageLoad(0x1c958018, uint64(len(file)), bytes.Join(path, nil)))
}

// program is a boot loader with a version.
func program(name, version string) []byte {
	return peimage.Image(peimage.Section{Name: ".text", Content: []byte(name + " " + version)})
}

// handOver measures as the kernel's EFI stub does: its command line and its initrd, no
// matter who loaded them.
func (s *sequence) handOver(initrd []byte) {
	s.addContent(9, eventlog.EventTag, utf16z(s.boot.CommandLine), taggedEvent(0x8f3b22ed, "LOADED_IMAGE::LoadOptions"))
	s.initrd(initrd)
}

func (s *sequence) initrd(content []byte) {
	s.addContent(9, eventlog.EventTag, content, taggedEvent(0x8f3b22ec, "Linux initrd"))
}

// stub describes the behaviour of one version of systemd-stub (its stub.c).
type stub struct {
	sections  []string // the measured sections, in this order
	osRelease bool     // added to the initrd, as /.extra/os-release
}

func (b Boot) stub() stub {
	if strings.HasPrefix(b.LoaderVersion, "252") {
		return stub{sections: []string{".linux", ".osrel", ".cmdline", ".initrd"}}
	}
	return stub{sections: []string{".linux", ".osrel", ".cmdline", ".initrd", ".uname", ".sbat"}, osRelease: true}
}

func (s *sequence) uki() {
	s.dbAuthority()
	s.add(5, eventlog.EFIGPTEvent, gpt())
	s.image(s.files.UKI, diskPath, filePath(`\EFI\BOOT\BOOTX64.EFI`), pathEnd)
	contents := map[string][]byte{}
	for _, section := range peimage.Sections(s.files.UKI) {
		contents[section.Name] = section.Content
	}
	stub := s.boot.stub()
	for _, name := range stub.sections {
		if content := contents[name]; content != nil {
			s.addContent(11, eventlog.IPL, append([]byte(name), 0), utf16z(name))
			s.addContent(11, eventlog.IPL, content, utf16z(name))
		}
	}
	if !s.boot.SecureBoot {
		// With Secure Boot off, the stub starts the kernel through the firmware, which
		// measures it. With Secure Boot on, the stub must start the kernel itself.
		s.image(contents[".linux"], pathEnd)
	}
	initrd := contents[".initrd"]
	if stub.osRelease {
		initrd = append(bytes.Clone(initrd), make([]byte, -len(initrd)&3)...)
		initrd = append(initrd, newc(file{name: ".extra"}, file{".extra/os-release", contents[".osrel"]})...)
	}
	s.handOver(initrd)
}

func (s *sequence) efiStub() {
	s.dbAuthority()
	s.add(5, eventlog.EFIGPTEvent, gpt())
	s.image(s.files.Kernel, diskPath, filePath(`\EFI\debian\vmlinuz.efi`), pathEnd)
	s.handOver(s.files.Initrd)
}

func (s *sequence) grub() {
	s.dbAuthority()
	s.add(5, eventlog.EFIGPTEvent, gpt())
	s.image(program("shim", "16.1"), diskPath, filePath(`\EFI\debian\shimx64.efi`), pathEnd)
	s.mok("MokList")
	s.mok("MokListX")
	s.authority(guidShim, "SbatLevel", []byte("sbat,1,2025021800\nshim,4\ngrub,5\n"))
	s.mok("MokListTrusted")
	s.authority(guidShim, "MokListRT", append(append([]byte(nil), guidShim[:]...), s.cert(vendorKey)...))
	s.image(program("grub", s.boot.LoaderVersion), filePath(`\EFI\debian\grubx64.efi`), pathEnd)
	s.grubCommands()
}

func (s *sequence) mok(name string) {
	s.addContent(14, eventlog.IPL, content(name), append([]byte(name), 0))
}

// grubCommands measures GRUB's part: each command and the kernel's command line into
// PCR 8, each file that GRUB reads into PCR 9.
func (s *sequence) grubCommands() {
	const config = "(hd0,gpt1)/EFI/debian/grub.cfg"
	linux := s.boot.linux()
	start, initrd := strings.Join(linux, " "), s.boot.initrdFile()
	command := func(prefix, line string) {
		s.addContent(8, eventlog.IPL, []byte(line), append([]byte(prefix+line), 0))
	}
	file := func(name string, measured []byte) {
		s.addContent(9, eventlog.IPL, measured, append([]byte(name), 0))
	}
	command("grub_cmd: ", "[ -e "+config+" ]")
	command("grub_cmd: ", "source "+config)
	file(config, s.files.GRUBConfig)
	command("grub_cmd: ", "set timeout=0")
	command("grub_cmd: ", "linux "+start)
	file(linux[0], s.files.Kernel)
	s.image(s.files.Kernel)
	if s.boot.SecureBoot {
		s.image(s.files.Kernel) // shim verifies the kernel, then GRUB starts it: two events
	}
	command("kernel_cmdline: ", start)
	command("grub_cmd: ", "initrd "+initrd)
	file(initrd, s.files.Initrd)
	command("grub_cmd: ", "boot")
}
