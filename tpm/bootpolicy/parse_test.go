package bootpolicy

import (
	"reflect"
	"strings"
	"testing"
)

const head = "apiVersion: kleidi.beezy.dev/v1alpha1\nkind: BootPolicy\nbank: sha256\n"

var someDigest = strings.Repeat("0123456789abcdef", 4)

func TestParse(t *testing.T) {
	p, err := Parse([]byte(head + `
secureBoot: enabled
firmware: {startupLocality: 3, versions: ["F2", ""]}
pcrs:
  0: {any: true}
  4:
    separator: false
    allowed:
      - ` + someDigest + `  # shim
  7:
    sequences:
      - - ` + someDigest + ` #  ## Secure   Boot
        - certificate: ` + someDigest + `  # Example CA
      - []
  8: {allowed: [{commandLine: "ro quiet"}, {text: "boot"}]}
`))
	if err != nil {
		t.Fatal(err)
	}
	three, no := 3, false
	want := &BootPolicy{APIVersion: APIVersion, Kind: Kind, Bank: "sha256", SecureBoot: SecureBootEnabled,
		Firmware: Firmware{&three, []string{"F2", ""}},
		PCRs: map[int]Rule{
			0: {Any: true},
			4: {Separator: &no, Allowed: []Entry{{FormDigest, someDigest, "shim"}}},
			7: {Sequences: [][]Entry{{{FormDigest, someDigest, "Secure Boot"}, {FormCertificate, someDigest, "Example CA"}}, {}}},
			8: {Allowed: []Entry{{FormCommandLine, "ro quiet", ""}, {FormText, "boot", ""}}},
		}}
	if !reflect.DeepEqual(p, want) {
		t.Errorf("%+v", p)
	}
}

func TestEveryProblemIsReportedAtOnce(t *testing.T) {
	_, err := Parse([]byte(`
apiVersion: kleidi.beezy.dev/v2
kind: Policy
bank: sha1
bank: sha256
secureBoot: on
secureboot: enabled
firmware: {startupLocality: 9, versions: F2}
pcrs:
  4: {any: true, allowed: [` + someDigest + `]}
  5: {}
  5: {any: true}
  6: {any: maybe}
  8: {sequences: [` + someDigest + `]}
  9: {allowed: [{commandLine: a}, {text: a, digest: b}, {digest: b}, [a], {text: [a]}, ~]}
  11: {allowed: []}
  12: {separator: true, sequences: []}
  13: {sequences: [[{certificate: ` + someDigest + `}]]}
  16: {any: true}
  03: {any: true}
  x: {any: true}
`))
	if err == nil {
		t.Fatal("accepted")
	}
	for _, want := range []string{
		`apiVersion: "kleidi.beezy.dev/v2"; want`, `kind: "Policy"; want BootPolicy`, `bank: "sha1"; want sha256 or sha384`, "bank: line 5: duplicate key",
		`secureBoot: "on"; want enabled or disabled`, "secureBoot: nothing proves it without PCR 7", "secureboot: line 7: unknown key",
		"firmware: nothing proves it without PCR 0", "firmware.startupLocality: 9", "firmware.versions: line 8: want a version in quotes",
		"pcrs.4: want one of any: true, allowed and sequences", "pcrs.5: want one of", "pcrs.5: line 12: duplicate key", "pcrs.6.any: line 13: want true or false",
		"pcrs.8.sequences[0]: line 14: want a list", "pcrs.9.allowed[0]: no digest of PCR 9 backs a command line", "pcrs.9.allowed[1]: line 15: want a digest, or one of",
		"pcrs.9.allowed[2].digest: line 15: unknown key", "pcrs.9.allowed[3]: line 15: want a digest", "pcrs.9.allowed[4].text: line 15: want text", "pcrs.9.allowed[5]: line 15: want a value of its own",
		"pcrs.11.allowed: it is empty", "pcrs.12.sequences: it is empty", "pcrs.12.separator: PCR 12 has none", "pcrs.13.sequences[0][0]: PCR 13 measures no certificates",
		"pcrs.16: PCR 16 does not exist or can be reset", "pcrs.03: line 20: the key must be a number", "pcrs.x: line 21: the key must be a number",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("no %q in\n%v", want, err)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	for name, c := range map[string]struct{ content, want string }{
		"empty":                 {"", "it is empty"},
		"no PCR":                {head + "pcrs: {}\n", "names no PCR"},
		"no pcrs":               {head, "names no PCR"},
		"a second document":     {head + "pcrs: {4: {any: true}}\n---\n" + head, "second document"},
		"too large":             {strings.Repeat("#", MaxSize+1), "more than"},
		"negative locality":     {head + "firmware: {startupLocality: -1}\npcrs: {0: {any: true}}\n", "startupLocality: -1; want 0 to 4"},
		"locality 5":            {head + "firmware: {startupLocality: 5}\npcrs: {0: {any: true}}\n", "startupLocality: 5; want 0 to 4"},
		"any: false":            {head + "pcrs: {4: {any: false}}\n", "want one of any: true"},
		"short digest":          {head + "pcrs: {4: {allowed: [" + someDigest[2:] + "]}}\n", "is no sha256 digest"},
		"capital digest":        {head + "pcrs: {4: {allowed: [" + strings.ToUpper(someDigest) + "]}}\n", "lower-case"},
		"digest of SHA-384":     {strings.Replace(head, "sha256", "sha384", 1) + "pcrs: {4: {allowed: [" + someDigest + "]}}\n", "is no sha384 digest"},
		"short certificate":     {head + "pcrs: {7: {allowed: [{certificate: ab}]}}\n", "is no SHA-256 digest of a certificate"},
		"alias":                 {head + "pcrs: {4: {allowed: [&a " + someDigest + ", *a]}}\n", "want a value of its own"},
		"long text":             {head + "pcrs: {4: {allowed: [{text: " + strings.Repeat("a", maxText+1) + "}]}}\n", "more than 4096"},
		"too many entries":      {head + "pcrs: {14: {sequences: [" + strings.Repeat("[],", MaxEntries+1) + "]}}\n", "more than 4096"},
		"command line in PCR 9": {head + "pcrs: {9: {allowed: [{commandLine: ro}]}}\n", "write it as text"},
	} {
		if p, err := Parse([]byte(c.content)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, %v; want %s", name, p, err, c.want)
		}
	}
}

func TestDiff(t *testing.T) {
	l := realLog(t, "uki-secureboot")
	a, b := record(t, l, judged(l)), record(t, l, judged(l))
	if d := Diff(a, b); len(d) > 0 {
		t.Fatalf("%v", d)
	}
	otherImage(t, l)
	secureBootOff(t, l)
	remove(l, find(t, l, 5, "partition table"))
	b = record(t, l, append(judged(l), 14))
	b.Firmware.Versions = []string{"F2"}
	allowList(11)(b)
	twice := b.PCRs[6].Sequences[0]
	b.PCRs[6] = Rule{Sequences: [][]Entry{twice, {}}}
	var got strings.Builder
	for _, c := range Diff(a, b) {
		got.WriteString(c.String() + "\n")
	}
	golden(t, "diff.txt", []byte(got.String()))
}

func FuzzParse(f *testing.F) {
	// Short seeds: Go spends minutes on minimising long ones.
	f.Add([]byte(head + "secureBoot: enabled\nfirmware: {startupLocality: 0, versions: [\"F2\"]}\npcrs:\n  0: {any: true}\n  7:\n    separator: false\n    sequences:\n      - - " + someDigest + "  # x\n      - []\n"))
	f.Add([]byte(head + "pcrs:\n  4:\n    allowed:\n      - text: \"a\\x00\\u2028\"  # note\n      - commandLine: ''\n"))
	f.Add([]byte(head + "pcrs: {7: {allowed: [{certificate: " + someDigest + "}]}}"))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := Parse(b)
		if err != nil {
			return
		}
		once := p.Marshal()
		again, err := Parse(once)
		if err != nil {
			t.Fatalf("%v\n%s", err, once)
		}
		if !reflect.DeepEqual(p, again) || string(once) != string(again.Marshal()) || len(Diff(p, again)) > 0 {
			t.Errorf("it reads back as another:\n%s\n%s", once, again.Marshal())
		}
	})
}
