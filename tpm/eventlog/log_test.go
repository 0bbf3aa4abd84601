package eventlog

import (
	"bytes"
	"crypto"
	"encoding/hex"
	"encoding/json"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-attestation/attest"
)

// realLogs were written by OVMF, systemd-stub, shim, GRUB and Linux under QEMU with a
// swtpm; pcrs.json holds the PCRs that the swtpm gave.
var realLogs = []string{"uki-secureboot", "shim-grub-secureboot", "direct-kernel"}

var sha256Only = []crypto.Hash{crypto.SHA256}

func readLog(t testing.TB, name string) []byte {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join("testdata", name, "binary_bios_measurements"))
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func parseLog(t testing.TB, name string) *Log {
	t.Helper()
	l, err := Parse(readLog(t, name))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func readPCRs(t testing.TB, name string, bank crypto.Hash) PCRs {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name, "pcrs.json"))
	if err != nil {
		t.Fatal(err)
	}
	var banks map[string]map[string]string
	if err := json.Unmarshal(b, &banks); err != nil {
		t.Fatal(err)
	}
	pcrs := PCRs{}
	for i, v := range banks[strings.ToUpper(BankName(bank))] {
		n, err := strconv.Atoi(i)
		if err != nil {
			t.Fatal(err)
		}
		if pcrs[n], err = hex.DecodeString(v); err != nil {
			t.Fatal(err)
		}
	}
	if len(pcrs) != NumPCRs {
		t.Fatalf("%d PCRs", len(pcrs))
	}
	return pcrs
}

func TestRealLogsReplayToTheQuotedPCRs(t *testing.T) {
	for _, name := range realLogs {
		for _, bank := range []crypto.Hash{crypto.SHA1, crypto.SHA256, crypto.SHA384, crypto.SHA512} {
			t.Run(name+"/"+BankName(bank), func(t *testing.T) {
				l, quoted := parseLog(t, name), readPCRs(t, name, bank)
				// Linux's own measurements (IMA, PCR 10) are in a separate log.
				var mismatch *MismatchError
				if err := l.Verify(bank, quoted); !errors.As(err, &mismatch) {
					t.Fatalf("PCR 10, which no event explains, passes: %v", err)
				}
				if !reflect.DeepEqual(mismatch.PCRs, []int{10}) || !reflect.DeepEqual(mismatch.Silent, []int{10}) {
					t.Fatalf("PCRs %v differ, silent %v, want 10", mismatch.PCRs, mismatch.Silent)
				}
				delete(quoted, 10)
				if err := l.Verify(bank, quoted); err != nil {
					t.Fatal(err)
				}
				if err := oracle(l.Encode(), bank, quoted); err != nil {
					t.Errorf("go-attestation disagrees: %v", err)
				}
			})
		}
	}
}

// oracle asks go-attestation whether the log leads to the PCRs.
func oracle(raw []byte, bank crypto.Hash, pcrs PCRs) error {
	_, err := oracleEvents(raw, bank, pcrs)
	return err
}

func oracleEvents(raw []byte, bank crypto.Hash, pcrs PCRs) ([]attest.Event, error) {
	el, err := attest.ParseEventLog(raw)
	if err != nil {
		return nil, err
	}
	var list []attest.PCR
	for i, v := range pcrs {
		list = append(list, attest.PCR{Index: i, Digest: v, DigestAlg: bank})
	}
	return el.Verify(list)
}

func TestVerifyNoticesEveryTamperedDigest(t *testing.T) {
	for _, name := range realLogs {
		quoted := readPCRs(t, name, crypto.SHA256)
		delete(quoted, 10)
		for i := range parseLog(t, name).Events {
			attacks := map[string]func(l *Log){
				"flip":      func(l *Log) { l.Events[i].Digest(crypto.SHA256)[7] ^= 1 },
				"drop":      func(l *Log) { l.Events = slices.Delete(l.Events, i, i+1) },
				"double":    func(l *Log) { l.Events = slices.Insert(l.Events, i, l.Events[i]) },
				"no action": func(l *Log) { l.Events[i].UntrustedType = NoAction },
				"move":      func(l *Log) { l.Events[i].PCR = (l.Events[i].PCR + 1) % NumPCRs },
			}
			for what, attack := range attacks {
				l := parseLog(t, name)
				attack(l)
				if err := l.Verify(crypto.SHA256, quoted); err == nil {
					t.Errorf("%s: event %d: %s passes", name, i, what)
				}
			}
		}
	}
}

func TestVerifyRefuses(t *testing.T) {
	l := &Log{Banks: sha256Only, Events: []Event{Measure(sha256Only, 4, Separator, []byte("x"), nil)}}
	four, err := l.Replay(crypto.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	ones, zeros := bytes.Repeat([]byte{0xff}, 32), make([]byte, 32)
	for name, c := range map[string]struct {
		bank   crypto.Hash
		quoted PCRs
		want   string // "" = passes
	}{
		"right":                   {crypto.SHA256, four, ""},
		"and an unextended one":   {crypto.SHA256, PCRs{4: four[4], 7: zeros}, ""},
		"dynamic launch PCR":      {crypto.SHA256, PCRs{17: ones}, ""},
		"dynamic launch happened": {crypto.SHA256, PCRs{17: zeros}, "no event at all for PCR 17"},
		"nothing quoted":          {crypto.SHA256, PCRs{}, "no PCR was quoted"},
		"event, but zero PCR":     {crypto.SHA256, PCRs{4: zeros}, "PCR 4"},
		"extended without event":  {crypto.SHA256, PCRs{7: four[4]}, "no event at all for PCR 7"},
		"short value":             {crypto.SHA256, PCRs{7: zeros[:31]}, "PCR 7"},
		"no value":                {crypto.SHA256, PCRs{7: nil}, "PCR 7"},
		"no such bank in log":     {crypto.SHA384, PCRs{4: four[4]}, "no sha384 digest"},
		"bank unknown to Go":      {SM3, four, "cannot compute sm3_256"},
	} {
		err := l.Verify(c.bank, c.quoted)
		switch {
		case c.want == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
}

// TestMismatchNamesSilentPCRs: the error names the silent PCRs, and no others.
func TestMismatchNamesSilentPCRs(t *testing.T) {
	l := &Log{Banks: sha256Only, Events: []Event{Measure(sha256Only, 4, IPL, []byte("x"), nil)}}
	wrong := bytes.Repeat([]byte{1}, 32)
	err := l.Verify(crypto.SHA256, PCRs{4: wrong, 5: wrong})
	var mismatch *MismatchError
	if !errors.As(err, &mismatch) || !slices.Equal(mismatch.PCRs, []int{4, 5}) || !slices.Equal(mismatch.Silent, []int{5}) {
		t.Errorf("%+v", mismatch)
	}
	if err := l.Verify(crypto.SHA256, PCRs{4: wrong}); err == nil || strings.Contains(err.Error(), "no event") {
		t.Error(err)
	}
}

// TestHandMadeLogsAreChecked: hand-made logs are checked like parsed ones.
func TestHandMadeLogsAreChecked(t *testing.T) {
	for _, pcr := range []int{NoPCR, NumPCRs} {
		pcrs, err := (&Log{Banks: sha256Only, Events: []Event{Measure(sha256Only, pcr, IPL, nil, nil)}}).Replay(crypto.SHA256)
		if err != nil || len(pcrs) > 0 {
			t.Errorf("an event on PCR %d is replayed: %x, %v", pcr, pcrs, err)
		}
	}
	none := Event{PCR: 4, UntrustedType: IPL, Digests: []Digest{{crypto.SHA256, nil}}}
	if _, err := (&Log{Banks: sha256Only, Events: []Event{none}}).Replay(crypto.SHA256); err == nil {
		t.Error("an empty digest is replayed")
	}
}

func TestStartupLocality(t *testing.T) {
	said := func(n byte) Event { return Informational(sha256Only, 0, append([]byte(startupLocality), n)) }
	extended := Measure(sha256Only, 0, CRTMVersion, []byte("1"), nil)
	start := make([]byte, 32)
	start[31] = 3
	digest := sum(crypto.SHA256, []byte("1"))
	for name, c := range map[string]struct {
		events []Event
		want   []byte // nil = refused
	}{
		"none":            {[]Event{extended}, sum(crypto.SHA256, make([]byte, 32), digest)},
		"three":           {[]Event{said(3), extended}, sum(crypto.SHA256, start, digest)},
		"three, no event": {[]Event{said(3)}, start},
		"twice":           {[]Event{said(0), said(3), extended}, nil},
		"too late":        {[]Event{extended, said(3)}, nil},
		"too big":         {[]Event{said(5), extended}, nil},
		// The entry may be larger than the structure. The others only look like a
		// locality.
		"another PCR":    {[]Event{Informational(sha256Only, 5, []byte(startupLocality+"\x03")), extended}, sum(crypto.SHA256, make([]byte, 32), digest)},
		"without a byte": {[]Event{Informational(sha256Only, 0, []byte(startupLocality)), extended}, sum(crypto.SHA256, make([]byte, 32), digest)},
		"two bytes":      {[]Event{Informational(sha256Only, 0, []byte(startupLocality+"\x03\x04")), extended}, sum(crypto.SHA256, start, digest)},
		"another type":   {[]Event{Measure(sha256Only, 23, IPL, nil, []byte(startupLocality+"\x03")), extended}, sum(crypto.SHA256, make([]byte, 32), digest)},
		"another name":   {[]Event{Informational(sha256Only, 0, []byte("StartupLocality!\x03")), extended}, sum(crypto.SHA256, make([]byte, 32), digest)},
	} {
		pcrs, err := (&Log{Banks: sha256Only, Events: c.events}).Replay(crypto.SHA256)
		if (err != nil) != (c.want == nil) || !bytes.Equal(pcrs[0], c.want) {
			t.Errorf("%s: %x, %v, want %x", name, pcrs[0], err, c.want)
		}
	}
}

// publicLogs are the test logs of two other projects, written by many firmwares
// (testdata/public). The value is a part of the reason for refusal.
var publicLogs = map[string]map[string]string{
	"go-attestation": {
		"coreos_36_shielded_vm_no_secure_boot_eventlog":   "",
		"crypto_agile_eventlog":                           "",
		"ebs_event_missing_eventlog":                      "SHA-1 format",
		"option_rom_eventlog":                             "SHA-1 format",
		"sb_cert_eventlog":                                "",
		"short_no_action_eventlog":                        "SHA-1 format",
		"ubuntu_2104_shielded_vm_no_secure_boot_eventlog": "",
	},
	"go-tpm-tools": {
		"arch-linux-workstation.bin":                 "",
		"confidential-gke-debug-251000_eventlog.bin": "",
		"cos-101-amd-sev.bin":                        "",
		"cos-85-amd-sev.bin":                         "",
		"cos-93-amd-sev.bin":                         "",
		"debian-10.bin":                              "SHA-1 format",
		"eventlogwithsp800155.bin":                   "",
		"gdc-host.bin":                               "",
		"glinux-alex.bin":                            "",
		"rhel8-uefi.bin":                             "",
		"ubuntu-1804-amd-sev.bin":                    "",
		"ubuntu-2104-no-dbx.bin":                     "",
		"ubuntu-2104-no-secure-boot.bin":             "",
		"ubuntu-2404-amd-sevsnp.bin":                 "",
	},
}

func eachPublicLog(t *testing.T, f func(t *testing.T, raw []byte, refusal string)) {
	t.Helper()
	for project, files := range publicLogs {
		for _, file := range slices.Sorted(maps.Keys(files)) {
			t.Run(file, func(t *testing.T) {
				raw, err := os.ReadFile(filepath.Join("testdata/public", project, file))
				if err != nil {
					t.Fatal(err)
				}
				f(t, raw, files[file])
			})
		}
	}
}

func TestPublicLogs(t *testing.T) {
	eachPublicLog(t, func(t *testing.T, raw []byte, refusal string) {
		l, err := Parse(raw)
		if refusal != "" {
			if err == nil || !strings.Contains(err.Error(), refusal) {
				t.Fatalf("%v, want %q", err, refusal)
			}
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(l.Encode(), raw) {
			t.Error("Encode(Parse(x)) is not x")
		}
		for _, bank := range l.Banks {
			pcrs, err := l.Replay(bank)
			if err != nil {
				t.Fatal(err)
			}
			if len(pcrs) < 4 {
				t.Errorf("%s: only %d PCRs have events", BankName(bank), len(pcrs))
			}
			if err := oracle(raw, bank, pcrs); err != nil {
				t.Errorf("%s: go-attestation replays to other values: %v", BankName(bank), err)
			}
			for i := range pcrs {
				pcrs[i][0] ^= 1
				if oracle(raw, bank, PCRs{i: pcrs[i]}) == nil || l.Verify(bank, PCRs{i: pcrs[i]}) == nil {
					t.Errorf("%s: a wrong PCR %d passes", BankName(bank), i)
				}
			}
		}
	})
}

// TestLogOfWindowsIsRefused: the last of go-attestation's test logs is inside a dump of
// everything that its tool asked for.
func TestLogOfWindowsIsRefused(t *testing.T) {
	b, err := os.ReadFile("testdata/public/go-attestation/windows_gcp_shielded_vm.json")
	if err != nil {
		t.Fatal(err)
	}
	var dump struct{ Log struct{ Raw []byte } }
	if err := json.Unmarshal(b, &dump); err != nil {
		t.Fatal(err)
	}
	if _, err := Parse(dump.Log.Raw); len(dump.Log.Raw) < 1000 || !errors.Is(err, ErrSHA1Log) {
		t.Errorf("%d bytes, %v", len(dump.Log.Raw), err)
	}
}

func TestParsedLogDoesNotReferToItsInput(t *testing.T) {
	raw := readLog(t, "uki-secureboot")
	l, want := parseLog(t, "uki-secureboot"), slices.Clone(raw)
	got, err := Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	clear(raw)
	if !reflect.DeepEqual(got, l) || !bytes.Equal(got.Encode(), want) {
		t.Error("the log changed with its input")
	}
}

func TestHandMadeLogRoundTrips(t *testing.T) {
	banks := []crypto.Hash{crypto.SHA1, crypto.SHA384, SM3, crypto.SHA3_256}
	l := &Log{Banks: banks, Events: []Event{
		Informational(banks, 0, []byte(startupLocality+"\x03")),
		Informational(banks, NoPCR, []byte("SP800-155 Event3")),
		Measure(banks, 0, CRTMVersion, []byte("v"), []byte("v")),
		Measure(banks, 23, Separator, make([]byte, 4), make([]byte, 4)),
	}}
	got, err := Parse(l.Encode())
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got.Events, l.Events) || !reflect.DeepEqual(got.Banks, l.Banks) {
		t.Errorf("got %+v", got)
	}
	if !got.Events[3].Proves(make([]byte, 4)) || got.Events[3].Proves(nil) {
		t.Error("Proves is wrong")
	}
	only, err := Parse(got.Only(crypto.SHA384).Encode())
	if err != nil {
		t.Fatal(err)
	}
	a, err1 := only.Replay(crypto.SHA384)
	b, err2 := l.Replay(crypto.SHA384)
	if err1 != nil || err2 != nil || !reflect.DeepEqual(a, b) {
		t.Errorf("one bank alone replays to %x (%v), with the others %x (%v)", a, err1, b, err2)
	}
	// go-attestation accepts no SM3 bank, but it accepts one other bank of such a log.
	if oracle(l.Encode(), crypto.SHA384, b) == nil || oracle(only.Encode(), crypto.SHA384, b) != nil {
		t.Error("go-attestation does not need Only, or Only does not help it")
	}
}
