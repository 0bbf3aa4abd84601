package eventlog

import (
	"crypto"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-attestation/attest"
)

func TestBootTypeOfRealLogs(t *testing.T) {
	for name, want := range map[string]struct {
		boot BootType
		pcrs []int
		on   bool
	}{
		"uki-secureboot":       {BootUKI, []int{4, 7, 11}, true},
		"shim-grub-secureboot": {BootGRUB, []int{4, 7, 8, 9, 14}, true},
		"direct-kernel":        {BootEFIStub, []int{4, 7, 9}, false},
	} {
		l := parseLog(t, name)
		if got := l.BootType(); got != want.boot || !reflect.DeepEqual(got.PCRs(l), want.pcrs) {
			t.Errorf("%s: %s %v, want %s %v", name, got, got.PCRs(l), want.boot, want.pcrs)
		}
		if on, known := l.SecureBoot(); on != want.on || !known {
			t.Errorf("%s: Secure Boot %v, known %v", name, on, known)
		}
	}
}

// go-attestation reads the state of Secure Boot from the events that it verified.
func TestSecureBootOfPublicLogsAsGoAttestationSeesIt(t *testing.T) {
	agreed := 0
	eachPublicLog(t, func(t *testing.T, raw []byte, refusal string) {
		if refusal != "" {
			return
		}
		l, err := Parse(raw)
		if err != nil {
			t.Fatal(err)
		}
		on, known := l.SecureBoot()
		if !known {
			t.Error("unknown")
		}
		bank := l.Banks[min(1, len(l.Banks)-1)]
		pcrs, err := l.Replay(bank)
		if err != nil {
			t.Fatal(err)
		}
		events, err := oracleEvents(raw, bank, pcrs)
		if err != nil {
			t.Fatal(err)
		}
		state, err := attest.ParseSecurebootState(events)
		if err != nil { // it knows fewer firmwares
			t.Logf("go-attestation: %v", err)
			return
		}
		agreed++
		if state.Enabled != on {
			t.Errorf("on %v, go-attestation %v", on, state.Enabled)
		}
	})
	if agreed < 10 {
		t.Errorf("go-attestation read only %d logs", agreed)
	}
}

// TestNothingVerified: without the authority, Secure Boot does not count as on, and
// go-attestation agrees.
func TestNothingVerified(t *testing.T) {
	l := parseLog(t, "uki-secureboot")
	l.Events = slices.DeleteFunc(l.Events, func(e Event) bool { return e.UntrustedType == EFIVariableAuthority })
	if s := l.SecureBootState(); s != SecureBootIdle {
		t.Errorf("%s, want %s", s, SecureBootIdle)
	}
	pcrs, err := l.Replay(crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	events, err := oracleEvents(l.Encode(), crypto.SHA256, pcrs)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := attest.ParseSecurebootState(events); err == nil || !strings.Contains(err.Error(), "no key was used") {
		t.Errorf("go-attestation: %v", err)
	}
}

func secureBootVar(data ...byte) Event {
	v := variable{globalVariable, "SecureBoot", data}.encode()
	return Measure(sha256Only, 7, EFIVariableDriverConfig, v, v)
}

// authorityOf returns firmware's event for the entry of a variable that let an image
// run.
func authorityOf(banks []crypto.Hash, vendor guid, name string, entry []byte) Event {
	v := variable{vendor, name, entry}.encode()
	return Measure(banks, 7, EFIVariableAuthority, v, v)
}

// certificateOfDB is an authority by a certificate, hashOfDB one by a hash of the image.
var (
	certificateOfDB = authorityOf(sha256Only, securityDatabase, "db", append(make([]byte, 16), 0x30, 2, 5, 0))
	hashOfDB        = authorityOf(sha256Only, securityDatabase, "db", make([]byte, 16+32))
)

// bootWith returns a log of one bank whose PCR 7 has these events.
func bootWith(events ...Event) *Log { return &Log{Banks: sha256Only, Events: events} }

func TestSecureBootBelievesOnlyWhatIsProven(t *testing.T) {
	on, off := secureBootVar(1), secureBootVar(0)
	separator := Measure(sha256Only, 7, Separator, separators[0], separators[0])
	relabelled := separator
	relabelled.UntrustedType, relabelled.UntrustedData = EFIAction, []byte("no separator at all")
	lie := off
	lie.UntrustedData = on.UntrustedData
	hidden := off
	hidden.UntrustedData = []byte("something else")
	elsewhere := on
	elsewhere.PCR = 6
	informational := on
	informational.UntrustedType = NoAction
	otherVendor := variable{securityDatabase, "SecureBoot", []byte{1}}.encode()
	os := Measure(sha256Only, 7, EventTag, []byte(OSSeparator), []byte(OSSeparator))
	vouched := certificateOfDB
	// The variable db itself, which is a setting and did not let an image run.
	list := binary.LittleEndian.AppendUint32(append([]byte(nil), certX509[:]...), 28+16+32)
	list = binary.LittleEndian.AppendUint32(list, 0)
	list = binary.LittleEndian.AppendUint32(list, 16+32)
	list = append(list, make([]byte, 16+32)...)
	// As long as an authority by a SHA-384 hash.
	short := binary.LittleEndian.AppendUint32(make([]byte, 16), 28+16+20)
	short = append(binary.LittleEndian.AppendUint32(append(short, 0, 0, 0, 0), 16+20), make([]byte, 16+20)...)
	setting := authorityOf(sha256Only, securityDatabase, "db", list)
	asSetting, unproven := vouched, vouched
	asSetting.UntrustedType = EFIVariableDriverConfig
	unproven.UntrustedData = hashOfDB.UntrustedData
	two := []crypto.Hash{crypto.SHA1, crypto.SHA256}
	halfTrue := Measure(two, 7, EFIVariableDriverConfig, off.UntrustedData, on.UntrustedData)
	copy(halfTrue.Digests[0].Value, sum(crypto.SHA1, on.UntrustedData))
	halfSeparator := Measure(two, 7, Separator, separators[0], nil)
	halfSeparator.Digests[0].Value[0] ^= 1
	onInTwo := Measure(two, 7, EFIVariableDriverConfig, on.UntrustedData, on.UntrustedData)
	for name, c := range map[string]struct {
		log       *Log
		on, known bool
	}{
		"on":                        {bootWith(on, separator, vouched), true, true},
		"vouched for by hash":       {bootWith(on, separator, hashOfDB), true, true},
		"vouched for earlier":       {bootWith(on, vouched, separator), true, true},
		"nobody vouched":            {bootWith(on, separator), false, false},
		"after the system's":        {bootWith(on, separator, os, vouched), false, false},
		"the variable db":           {bootWith(on, separator, setting), false, false},
		"SBAT level":                {bootWith(on, separator, authorityOf(sha256Only, guid{1}, "SbatLevel", make([]byte, 64))), false, false},
		"key of shim":               {bootWith(on, separator, authorityOf(sha256Only, guid{1}, "MokListRT", make([]byte, 64))), false, false},
		"another vendor's db":       {bootWith(on, separator, authorityOf(sha256Only, guid{1}, "db", make([]byte, 64))), false, false},
		"no certificate":            {bootWith(on, separator, authorityOf(sha256Only, securityDatabase, "db", make([]byte, 16+31))), false, false},
		"dbx":                       {bootWith(on, separator, authorityOf(sha256Only, securityDatabase, "dbx", make([]byte, 16+32))), false, false},
		"db of one SHA-1 hash":      {bootWith(on, separator, authorityOf(sha256Only, securityDatabase, "db", short)), false, false},
		"empty db":                  {bootWith(on, separator, authorityOf(sha256Only, securityDatabase, "db", nil)), false, false},
		"authority, as a setting":   {bootWith(on, separator, asSetting), false, false},
		"unproven authority":        {bootWith(on, separator, unproven), false, false},
		"off":                       {bootWith(off, separator), false, true},
		"variable absent":           {bootWith(secureBootVar(), separator), false, true},
		"os separator later":        {bootWith(on, separator, vouched, os), true, true},
		"unproven event later":      {bootWith(on, separator, vouched, hidden), true, true},
		"empty log":                 {bootWith(), false, false},
		"no separator":              {bootWith(on), false, false},
		"nothing but a separator":   {bootWith(separator), false, false},
		"data lies":                 {bootWith(lie, separator), false, false},
		"off hidden, on later":      {bootWith(hidden, on, separator), false, false},
		"both":                      {bootWith(off, on, separator), false, false},
		"twice":                     {bootWith(on, on, separator), false, false},
		"on after the separator":    {bootWith(separator, on), false, false},
		"two separators":            {bootWith(off, separator, on, separator), false, false},
		"two, the first relabelled": {bootWith(off, relabelled, on, separator), false, false},
		"two, the last relabelled":  {bootWith(on, separator, relabelled), false, false},
		"separator of wrong digest": {bootWith(on, Measure(sha256Only, 7, Separator, []byte("x"), separators[0]), separator), false, false},
		"separator of ones":         {bootWith(on, Measure(sha256Only, 7, Separator, separators[1], separators[1]), vouched), true, true},
		"one separator of each":     {bootWith(on, separator, Measure(sha256Only, 7, Separator, separators[1], nil)), false, false},
		"error separator":           {bootWith(on, Measure(sha256Only, 7, Separator, separators[2], separators[2])), false, false},
		"in another PCR":            {bootWith(elsewhere, separator), false, false},
		"not extended":              {bootWith(informational, separator), false, false},
		"another vendor's variable": {bootWith(Measure(sha256Only, 7, EFIVariableDriverConfig, otherVendor, otherVendor), separator), false, false},
		"two bytes":                 {bootWith(secureBootVar(1, 0), separator), false, false},
		"neither 0 nor 1":           {bootWith(secureBootVar(2), separator), false, false},
		"separator of other data":   {bootWith(on, Measure(sha256Only, 7, Separator, []byte("x"), []byte("x")), separator), false, false},
		"separator in one bank":     {&Log{Banks: two, Events: []Event{onInTwo, halfSeparator}}, false, false},
		"on in two banks": {&Log{Banks: two, Events: []Event{onInTwo, Measure(two, 7, Separator, separators[0], nil),
			authorityOf(two, securityDatabase, "db", make([]byte, 48))}}, true, true},
		"true in one bank only": {&Log{Banks: two, Events: []Event{halfTrue, Measure(two, 7, Separator, separators[0], nil)}}, false, false},
	} {
		if on, known := c.log.SecureBoot(); on != c.on || known != c.known {
			t.Errorf("%s: on %v, known %v, want %v, %v", name, on, known, c.on, c.known)
		}
	}
}

// TestProvesInEveryBankThatGoCanCompute, and in none without one.
func TestProvesInEveryBankThatGoCanCompute(t *testing.T) {
	text, two := []byte("x"), []crypto.Hash{crypto.SHA256, SM3}
	whole := Measure(two, 7, IPL, text, text)
	whole.Digests[1].Value = sum(crypto.SHA256, []byte("what SM3 gives"))
	for name, c := range map[string]struct {
		e    Event
		want bool
	}{
		"one bank":         {Measure(sha256Only, 7, IPL, text, text), true},
		"and SM3":          {whole, true},
		"SM3 alone":        {Event{Digests: whole.Digests[1:]}, false},
		"zeros in SM3":     {Measure([]crypto.Hash{SM3}, 7, IPL, text, text), false},
		"no digest":        {Event{UntrustedData: text}, false},
		"SHA-1 is another": {Event{Digests: append(Measure([]crypto.Hash{crypto.SHA1}, 7, IPL, nil, nil).Digests, whole.Digests...)}, false},
	} {
		if c.e.Proves(text) != c.want {
			t.Errorf("%s: %v", name, !c.want)
		}
	}
	// An SM3 bank hides no state, nor does a digest of zeros in it look like a separator.
	l := &Log{Banks: two, Events: []Event{Measure(two, 7, EFIVariableDriverConfig, secureBootVar(1).UntrustedData, secureBootVar(1).UntrustedData),
		Measure(two, 7, EFIAction, text, text), Measure(two, 7, Separator, separators[0], separators[0]),
		authorityOf(two, securityDatabase, "db", make([]byte, 48))}}
	if on, known := l.SecureBoot(); !on || !known {
		t.Errorf("with SM3: on %v, known %v", on, known)
	}
}

func TestBootTypeBelievesOnlyWhatIsProven(t *testing.T) {
	ipl := func(pcr int, measured, data string) Event {
		return Measure(sha256Only, pcr, IPL, []byte(measured), []byte(data))
	}
	section := ipl(11, ".linux\x00", "")
	cmdline := ipl(11, ".cmdline\x00", "")
	grub := ipl(8, "boot", "grub_cmd: boot\x00")
	initrd := ipl(9, "initrd's bytes", string(taggedEvent(tagLinuxInitrd, []byte("Linux initrd\x00"))))
	stub := ipl(9, "the command line", string(taggedEvent(tagLinuxLoadOptions, []byte("LOADED_IMAGE::LoadOptions\x00"))))
	disk := ipl(11, ".initrd\x00", "")
	given := ipl(12, "r\x00o\x00o\x00t\x00", "r\x00o\x00o\x00t\x00")
	mok := ipl(14, "x", "MokList\x00")
	separator := Measure(sha256Only, 7, Separator, separators[0], separators[0])
	for name, c := range map[string]struct {
		log  *Log
		boot BootType
		pcrs []int
	}{
		"empty":                 {bootWith(), BootUnknown, nil},
		"claimed section":       {bootWith(ipl(11, "x", ".linux\x00")), BootUnknown, nil},
		"section elsewhere":     {bootWith(ipl(12, ".linux\x00", "")), BootUnknown, nil},
		"claimed GRUB":          {bootWith(ipl(8, "x", "grub_cmd: boot\x00")), BootUnknown, nil},
		"GRUB":                  {bootWith(grub), BootGRUB, []int{4, 7, 8, 9}},
		"GRUB, shim":            {bootWith(grub, mok), BootGRUB, []int{4, 7, 8, 9, 14}},
		"GRUB starts a UKI":     {bootWith(grub, section, mok), BootGRUB, []int{4, 7, 8, 9, 11, 14}},
		"RHEL 8's GRUB":         {bootWith(ipl(8, "boot\x00", "grub_cmd boot")), BootGRUB, []int{4, 7, 8, 9}},
		"UKI":                   {bootWith(secureBootVar(1), separator, certificateOfDB, section, cmdline, disk, stub), BootUKI, []int{4, 7, 11}},
		"UKI, nothing verified": {bootWith(secureBootVar(1), separator, section, cmdline, disk, stub), BootUKI, []int{4, 7, 9, 11}},
		"UKI, no command line":  {bootWith(secureBootVar(1), separator, certificateOfDB, section, disk, stub), BootUKI, []int{4, 7, 9, 11}},
		"UKI, no initrd":        {bootWith(secureBootVar(1), separator, certificateOfDB, section, cmdline, stub), BootUKI, []int{4, 7, 9, 11}},
		"UKI, Secure Boot off":  {bootWith(secureBootVar(0), separator, section, cmdline, disk, stub), BootUKI, []int{4, 7, 9, 11}},
		"UKI, unknown":          {bootWith(section, cmdline, disk, stub), BootUKI, []int{4, 7, 9, 11}},
		"UKI, off, PCR 9 empty": {bootWith(section, cmdline, disk), BootUKI, []int{4, 7, 11}},
		"UKI, older kernel":     {bootWith(section, disk, initrd, given), BootUKI, []int{4, 7, 9, 11, 12}},
		"stub":                  {bootWith(stub), BootEFIStub, []int{4, 7, 9}},
		"initrd alone":          {bootWith(initrd), BootUnknown, nil},
	} {
		if got := c.log.BootType(); got != c.boot || !reflect.DeepEqual(got.PCRs(c.log), c.pcrs) {
			t.Errorf("%s: %s %v, want %s %v", name, got, got.PCRs(c.log), c.boot, c.pcrs)
		}
	}
}

// TestMeasuredOfPublicLogs: Measured finds the parts of real boots. A boot with a known
// boot type has all the parts that the type demands.
func TestMeasuredOfPublicLogs(t *testing.T) {
	unknown := 0
	eachPublicLog(t, func(t *testing.T, raw []byte, refusal string) {
		l, err := Parse(raw)
		if err != nil {
			return
		}
		m := l.Measured()
		if !m.Image {
			t.Error("no image in PCR 4")
		}
		switch boot := l.BootType(); {
		case boot == BootUnknown:
			unknown++
		case boot != BootGRUB || !m.CommandLine || !m.File:
			t.Errorf("%s: %+v", boot, m)
		}
	})
	if unknown > 4 {
		t.Errorf("of %d logs the boot type is unknown", unknown)
	}
}

// TestMeasuredIsNothingElse: an event that only claims to be a part of the boot, with
// the digest of a separator, an action or its own text, does not count.
func TestMeasuredIsNothingElse(t *testing.T) {
	load := string(imageLoad{size: 1}.encode())
	tagged := string(taggedEvent(tagLinuxLoadOptions, nil))
	disk := string(taggedEvent(tagLinuxInitrd, nil))
	measured := func(pcr int, typ EventType, measured, data string) Event {
		return Measure(sha256Only, pcr, typ, []byte(measured), []byte(data))
	}
	parts := map[string]func(measured string) Event{
		"image":        func(s string) Event { return measured(4, EFIBootServicesApp, s, load) },
		"file":         func(s string) Event { return measured(9, IPL, s, "/vmlinuz") },
		"load options": func(s string) Event { return measured(9, EventTag, s, tagged) },
		"initrd":       func(s string) Event { return measured(9, EventTag, s, disk) },
	}
	holds := func(e ...Event) bool {
		m := bootWith(e...).Measured()
		return m.Image || m.File || m.LoadOptions || m.Initrd
	}
	for name, part := range parts {
		if !holds(part("the content")) {
			t.Errorf("%s: not found", name)
		}
		for _, other := range append(actions, "", "\x00\x00\x00\x00", "\xff\xff\xff\xff", "\x01\x00\x00\x00") {
			if holds(part(other)) {
				t.Errorf("%s with the digest of %q is taken for one", name, other)
			}
		}
		own := part("the content")
		own.Digests[0].Value = sum(crypto.SHA256, own.UntrustedData)
		system := part(OSSeparator)
		if holds(own) {
			t.Errorf("%s: its own data is taken for the content", name)
		}
		if holds(system, part("the content")) {
			t.Errorf("%s: what the system measured is taken for one", name)
		}
	}
	for name, e := range map[string]Event{
		"a driver":         measured(4, EFIBootServicesDriver, "the content", load),
		"an empty image":   measured(4, EFIBootServicesApp, "the content", string(imageLoad{size: 0}.encode())),
		"no image at all":  measured(4, EFIBootServicesApp, "the content", "x"),
		"in another PCR":   measured(5, EFIBootServicesApp, "the content", load),
		"a nameless file":  measured(9, IPL, "the content", ""),
		"another PCR's":    measured(8, EventTag, "the content", tagged),
		"not even claimed": measured(9, NoAction, "the content", tagged),
	} {
		if holds(e) {
			t.Errorf("%s is taken for a part of the boot", name)
		}
	}
}

// record is a line of systemd's log, as systemd writes it.
func record(pcr int, text string) string {
	var digests []string
	for _, bank := range []crypto.Hash{crypto.SHA1, crypto.SHA256} {
		digests = append(digests, fmt.Sprintf(`{"hashAlg":"%s","digest":"%s"}`, BankName(bank), hex.EncodeToString(sum(bank, []byte(text)))))
	}
	return fmt.Sprintf("\x1e{\"pcr\":%d,\"digests\":[%s],\"content_type\":\"systemd\",\"content\":{\"string\":%q,\"bootId\":\"8e5ed9a7b3a44e1b9ad7f6b6a4b1b2c3\",\"timestamp\":2343289,\"eventType\":\"phase\"}}\n",
		pcr, strings.Join(digests, ","), text)
}

const nvRecord = "\x1e" + `{"nv_index":30474705,"digests":[{"hashAlg":"sha256","digest":"00"}],"content_type":"systemd","content":{"string":"x","eventType":"nvpcr-init"}}` + "\n"

func TestUserspaceLog(t *testing.T) {
	raw := record(11, "enter-initrd") + nvRecord + record(7, OSSeparator)
	events, err := ParseUserspace([]byte(raw))
	if err != nil {
		t.Fatal(err)
	}
	banks := []crypto.Hash{crypto.SHA1, crypto.SHA256}
	want := []Event{
		Measure(banks, 11, EventTag, []byte("enter-initrd"), []byte("enter-initrd")),
		Measure(banks, 7, EventTag, []byte(OSSeparator), []byte(OSSeparator)),
	}
	if !reflect.DeepEqual(events, want) {
		t.Errorf("got %+v", events)
	}
	if events, err := ParseUserspace(nil); err != nil || len(events) != 0 {
		t.Errorf("empty: %v, %v", events, err)
	}
}

func TestFirmwareLogWithUserspaceLogReplays(t *testing.T) {
	l, quoted := parseLog(t, "uki-secureboot"), readPCRs(t, "uki-secureboot", crypto.SHA256)
	delete(quoted, 10)
	for _, pcr := range []int{0, 1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 14} { // what systemd-pcrosseparator does
		quoted.extend(crypto.SHA256, pcr, sum(crypto.SHA256, []byte(OSSeparator)))
	}
	if l.Verify(crypto.SHA256, quoted) == nil {
		t.Error("verifies without the userspace log")
	}
	var raw strings.Builder
	for _, pcr := range []int{0, 1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 14} {
		raw.WriteString(record(pcr, OSSeparator))
	}
	events, err := ParseUserspace([]byte(raw.String()))
	if err != nil {
		t.Fatal(err)
	}
	l.Append(events)
	if err := l.Verify(crypto.SHA256, quoted); err != nil {
		t.Error(err)
	}
	if err := oracle(l.Only(crypto.SHA256).Encode(), crypto.SHA256, quoted); err != nil {
		t.Errorf("go-attestation: %v", err)
	}
	if on, known := l.SecureBoot(); !on || !known {
		t.Errorf("Secure Boot %v, known %v", on, known)
	}
	if err := l.Verify(crypto.SHA384, quoted); err == nil || !strings.Contains(err.Error(), "no sha384 digest") {
		t.Errorf("a bank that the userspace log leaves out: %v", err)
	}
}

// TestRecordSeparatorsInARow: two record separators in a row count as one (RFC 7464,
// 2.1). A measurement into a PCR that does not exist is skipped.
func TestRecordSeparatorsInARow(t *testing.T) {
	one, two := record(11, "enter-initrd"), record(11, "ready")
	want, err := ParseUserspace([]byte(one + two))
	if err != nil || len(want) != 2 {
		t.Fatalf("%v, %v", want, err)
	}
	for name, raw := range map[string]string{
		"at first":       "\x1e" + one + two,
		"between":        one + "\x1e\x1e\x1e" + two,
		"with a newline": "\x1e\n" + one + "\x1e \r\n\t\x1e" + two,
		"PCR 24":         one + record(24, "nowhere") + two,
		"PCR 1<<60":      one + record(1<<60, "nowhere") + two,
	} {
		if got, err := ParseUserspace([]byte(raw)); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

func TestParseUserspaceRefuses(t *testing.T) {
	good := record(11, "sysinit")
	for name, c := range map[string]struct{ raw, want string }{
		"too big":          {strings.Repeat(" ", MaxSize+1), "more than 16777216"},
		"too many":         {strings.Repeat("\x1e", MaxEvents+1), "more than 65536"},
		"no separator":     {good[1:], "record separator"},
		"truncated":        {good + good[:len(good)-1], "record 1: truncated"},
		"nothing at all":   {"\x1e", "record 0: truncated"},
		"nothing at last":  {good + "\x1e", "record 1: truncated"},
		"spaces at last":   {good + "\x1e \x1e ", "record 1: truncated"},
		"not JSON":         {"\x1e{\n", "record 0"},
		"two values":       {"\x1e{}{}\n", "record 0"},
		"no PCR":           {strings.Replace(good, `"pcr":11,`, "", 1), "either pcr or nv_index"},
		"PCR and NV":       {strings.Replace(good, `"pcr":11,`, `"pcr":11,"nv_index":1,`, 1), "either pcr or nv_index"},
		"other case":       {strings.Replace(good, `"pcr"`, `"PCR"`, 1), "either pcr or nv_index"},
		"PCR twice":        {strings.Replace(good, `"pcr":11,`, `"pcr":11,"pcr":4,`, 1), "duplicate"},
		"negative PCR":     {strings.Replace(good, `"pcr":11,`, `"pcr":-1,`, 1), "record 0"},
		"fractional PCR":   {strings.Replace(good, `"pcr":11,`, `"pcr":1.5,`, 1), "record 0"},
		"short digest":     {strings.Replace(good, `"digest":"`, `"digest":"00`, 1), "malformed sha1 digest"},
		"digest not hex":   {strings.Replace(good, `"digest":"`, `"digest":"xx`, 1), "malformed sha1 digest"},
		"bank twice":       {strings.Replace(good, `"sha256"`, `"sha1"`, 1), "malformed sha1"},
		"digest twice":     {strings.Replace(good, `"digests":[`, `"digests":[{"hashAlg":"sha1","digest":"`+strings.Repeat("00", 20)+`"},`, 1), "two sha1 digests"},
		"no digests":       {"\x1e{\"pcr\":1,\"digests\":[]}\n", "no digest"},
		"unknown banks":    {strings.NewReplacer("sha1", "md4", "sha256", "md5").Replace(good), "no digest"},
		"digests not list": {"\x1e{\"pcr\":1,\"digests\":{}}\n", "record 0"},
	} {
		if _, err := ParseUserspace([]byte(c.raw)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

func FuzzParseUserspace(f *testing.F) {
	f.Add([]byte(record(11, "enter-initrd") + nvRecord + record(7, OSSeparator)))
	f.Fuzz(func(t *testing.T, raw []byte) {
		events, err := ParseUserspace(raw)
		if err != nil {
			return
		}
		if len(events) > MaxEvents {
			t.Errorf("%d events", len(events))
		}
		for _, e := range events {
			if e.PCR < 0 || e.PCR >= NumPCRs || len(e.Digests) == 0 {
				t.Errorf("%+v", e)
			}
			for _, d := range e.Digests {
				if len(d.Value) != size(d.Hash) {
					t.Errorf("%+v", d)
				}
			}
		}
	})
}
