package bootpolicy

import (
	"crypto"
	"crypto/sha256"
	"fmt"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// A forgery is one way to boot differently, or to lie about a boot.
type forgery struct {
	name string
	log  string // the real log that it starts from; uki-secureboot if empty
	// policy edits the boot policy that was recorded of the honest boot.
	policy func(p *BootPolicy)
	// forge changes the log.
	forge func(t *testing.T, l *eventlog.Log)
	// lie leaves the quote of the honest boot: only the log is forged. Otherwise the
	// machine really booted as the log says, and the quote agrees with it.
	lie bool
	// quote changes the quote.
	quote func(q eventlog.PCRs)
	// refused is the rule that refuses; "" if the boot is to be accepted.
	refused string
	problem string
}

func TestForgeries(t *testing.T) {
	for _, list := range [][]forgery{evidence, separators, secureBoot, authorities, firmware, lists, texts, commandLines} {
		for _, f := range list {
			t.Run(f.name, f.run)
		}
	}
}

func (f forgery) run(t *testing.T) {
	name := f.log
	if name == "" {
		name = "uki-secureboot"
	}
	l := realLog(t, name)
	p := record(t, l, judged(l))
	if f.policy != nil {
		f.policy(p)
		if err := p.Validate(); err != nil {
			t.Fatal(err)
		}
		if v := Judge(p, l, booted(t, p, l)); f.forge != nil && !v.Accepted {
			t.Fatalf("the honest boot is refused: %v", v.Err())
		}
	}
	quoted := booted(t, p, l)
	if f.forge != nil {
		f.forge(t, l)
	}
	if !f.lie {
		quoted = booted(t, p, l)
	}
	if f.quote != nil {
		f.quote(quoted)
	}
	v := Judge(p, l, quoted)
	if f.refused == "" {
		if !v.Accepted || v.Err() != nil {
			t.Fatalf("refused: %v", v.Err())
		}
		return
	}
	if v.Accepted || v.Err() == nil || len(v.Findings) == 0 {
		t.Fatal("accepted")
	}
	first := v.Findings[0]
	if first.Rule != f.refused || !strings.Contains(first.Problem, f.problem) {
		t.Errorf("%s\nwant %s: %s", first, f.refused, f.problem)
	}
	if first.Next == "" {
		t.Errorf("%s: no next step", first)
	}
}

// anyIn accepts everything in some PCRs, so that another rule must refuse.
func anyIn(pcrs ...int) func(p *BootPolicy) {
	return func(p *BootPolicy) {
		for _, pcr := range pcrs {
			p.PCRs[pcr] = Rule{Any: true}
		}
	}
}

var evidence = []forgery{
	{name: "honest"},
	{name: "honest, recorded by hand", lie: true},
	{name: "quote without a PCR", quote: func(q eventlog.PCRs) { delete(q, 7) }, refused: "pcrs.7", problem: "not quoted"},
	{name: "quote of nothing", quote: func(q eventlog.PCRs) { clear(q) }, refused: "pcrs.0", problem: "not quoted"},
	{name: "quote of one PCR more", quote: func(q eventlog.PCRs) { q[15] = make([]byte, 32) }, refused: "pcrs", problem: "PCR 15 was quoted"},
	{name: "quote of another bank", quote: func(q eventlog.PCRs) { q[4] = make([]byte, 20) }, refused: "pcrs.4", problem: "not quoted in this bank"},
	{name: "log without the bank", lie: true, forge: func(_ *testing.T, l *eventlog.Log) { *l = *l.Only(crypto.SHA1) },
		refused: "bank", problem: "the log does not have this bank"},
	{name: "event without a digest of the bank", lie: true, forge: func(_ *testing.T, l *eventlog.Log) { l.Events[3].Digests = l.Events[3].Digests[:1] },
		refused: "bank", problem: "has no sha256 digest"},
	{name: "other digest", lie: true, forge: func(_ *testing.T, l *eventlog.Log) { l.Events[3].Digest(crypto.SHA256)[0] ^= 1 },
		refused: "pcrs.7", problem: "do not lead"},
	{name: "extended PCR without events", lie: true, forge: func(_ *testing.T, l *eventlog.Log) { removeAll(l, 11) },
		refused: "pcrs.11", problem: "no event of it"},
	{name: "extended PCR without events, anything allowed", lie: true, policy: anyIn(11), forge: func(_ *testing.T, l *eventlog.Log) { removeAll(l, 11) },
		refused: "pcrs.11", problem: "no event of it"},
	{name: "PCR not extended at all", forge: func(_ *testing.T, l *eventlog.Log) { removeAll(l, 11) },
		refused: "pcrs.11.sequences[0][0]", problem: "is gone"},
	{name: "event hidden as EV_NO_ACTION", lie: true, forge: func(t *testing.T, l *eventlog.Log) {
		l.Events[find(t, l, 4, "image")].UntrustedType = eventlog.NoAction
	},
		refused: "pcrs.4", problem: "do not lead"},
	{name: "digests of other banks are not looked at", forge: func(_ *testing.T, l *eventlog.Log) {
		for _, e := range l.Events {
			e.Digest(crypto.SHA1)[0] ^= 1
			e.Digest(crypto.SHA512)[0] ^= 1
		}
	}},
	{name: "events of other PCRs are not judged", forge: func(_ *testing.T, l *eventlog.Log) {
		l.Append([]eventlog.Event{measure(l, 10, eventlog.IPL, "ima", "ima")})
	}},
	{name: "types and data claim something else", policy: func(p *BootPolicy) { p.SecureBoot = "" },
		forge: func(_ *testing.T, l *eventlog.Log) {
			for i := range l.Events {
				l.Events[i].UntrustedType, l.Events[i].UntrustedData = eventlog.EventType(i+100), []byte("\x1b[2Jlies")
			}
		}},
}

var zeros, errorData = "\x00\x00\x00\x00", "\x01\x00\x00\x00"

var separators = []forgery{
	{name: "two separators", policy: anyIn(4), forge: func(t *testing.T, l *eventlog.Log) {
		insert(l, find(t, l, 4, "image"), measure(l, 4, eventlog.Separator, zeros, zeros))
	}, refused: "pcrs.4.separator", problem: "do not end once"},
	{name: "two separators, one under another type", policy: anyIn(4), forge: func(t *testing.T, l *eventlog.Log) {
		insert(l, find(t, l, 4, "image"), measure(l, 4, eventlog.IPL, "\xff\xff\xff\xff", "an innocent event"))
	}, refused: "pcrs.4.separator", problem: "do not end once"},
	{name: "no separator", policy: anyIn(2), forge: func(t *testing.T, l *eventlog.Log) { remove(l, find(t, l, 2, "separator")) },
		refused: "pcrs.2.separator", problem: "do not end once"},
	{name: "separator that reports an error", policy: anyIn(2), forge: func(t *testing.T, l *eventlog.Log) {
		l.Events[find(t, l, 2, "separator")] = measure(l, 2, eventlog.Separator, errorData, errorData)
	}, refused: "pcrs.2.separator", problem: "could not measure"},
	{name: "error behind the data of a separator", policy: anyIn(2), forge: func(t *testing.T, l *eventlog.Log) {
		l.Events[find(t, l, 2, "separator")] = measure(l, 2, eventlog.Separator, errorData, zeros)
	}, refused: "pcrs.2.separator", problem: "could not measure"},
	{name: "error under another type", policy: anyIn(2), forge: func(t *testing.T, l *eventlog.Log) {
		l.Events[find(t, l, 2, "separator")] = measure(l, 2, eventlog.IPL, errorData, "an innocent event")
	}, refused: "pcrs.2.separator", problem: "could not measure"},
	{name: "claimed separator", policy: anyIn(4), forge: func(t *testing.T, l *eventlog.Log) {
		insert(l, find(t, l, 4, "image"), measure(l, 4, eventlog.Separator, "rootkit", zeros))
	}, refused: "pcrs.4.separator", problem: "claims to be a separator"},
	{name: "two separators where none is demanded", policy: func(p *BootPolicy) {
		no := false
		p.PCRs[2] = Rule{Any: true, Separator: &no}
	}, forge: func(t *testing.T, l *eventlog.Log) {
		insert(l, find(t, l, 2, "separator"), measure(l, 2, eventlog.Separator, zeros, zeros))
	}},
}

func secureBootOff(t *testing.T, l *eventlog.Log) {
	off := variable(globalGUID, "SecureBoot", "\x00")
	l.Events[find(t, l, 7, "Secure Boot: on")] = measure(l, 7, eventlog.EFIVariableDriverConfig, off, off)
}

var secureBoot = []forgery{
	{name: "Secure Boot off", policy: anyIn(7), forge: secureBootOff, refused: "secureBoot", problem: "in another state"},
	{name: "Secure Boot off, logged as on", policy: anyIn(7), forge: func(t *testing.T, l *eventlog.Log) {
		i := find(t, l, 7, "Secure Boot: on")
		on := l.Events[i].UntrustedData
		secureBootOff(t, l)
		l.Events[i].UntrustedData = on
	}, refused: "secureBoot", problem: "does not prove"},
	{name: "Secure Boot off, no such event", policy: anyIn(7), forge: func(t *testing.T, l *eventlog.Log) {
		remove(l, find(t, l, 7, "Secure Boot: on"))
	}, refused: "secureBoot", problem: "does not prove"},
	{name: "Secure Boot off, and measured as on later", policy: anyIn(7), forge: func(t *testing.T, l *eventlog.Log) {
		on := l.Events[find(t, l, 7, "Secure Boot: on")]
		secureBootOff(t, l)
		l.Append([]eventlog.Event{on})
	}, refused: "secureBoot", problem: "in another state"},
	{name: "Secure Boot twice", policy: anyIn(7), forge: func(t *testing.T, l *eventlog.Log) {
		i := find(t, l, 7, "Secure Boot: on")
		insert(l, i, l.Events[i])
	}, refused: "secureBoot", problem: "does not prove"},
	{name: "Secure Boot on where it is to be off", log: "direct-kernel", policy: anyIn(7), forge: func(t *testing.T, l *eventlog.Log) {
		on := variable(globalGUID, "SecureBoot", "\x01")
		l.Events[find(t, l, 7, "Secure Boot: off")] = measure(l, 7, eventlog.EFIVariableDriverConfig, on, on)
	}, refused: "secureBoot", problem: "no key that verified"},
	{name: "Secure Boot on, and nothing verified", policy: anyIn(7), forge: func(t *testing.T, l *eventlog.Log) {
		remove(l, find(t, l, 7, "authorised by"))
	}, refused: "secureBoot", problem: "no key that verified"},
	{name: "Secure Boot on, and nothing verified, before the system", policy: anyIn(7), forge: func(t *testing.T, l *eventlog.Log) {
		insert(l, find(t, l, 7, "authorised by"), measure(l, 7, eventlog.EventTag, eventlog.OSSeparator, eventlog.OSSeparator))
	}, refused: "secureBoot", problem: "no key that verified"},
	{name: "Secure Boot on, and the certificate measured as a setting", policy: anyIn(7), forge: func(t *testing.T, l *eventlog.Log) {
		l.Events[find(t, l, 7, "authorised by")].UntrustedType = eventlog.EFIVariableDriverConfig
	}, refused: "secureBoot", problem: "no key that verified"},
	{name: "Secure Boot on, and shim's SBAT level alone", log: "shim-grub-secureboot", policy: anyIn(7), forge: func(t *testing.T, l *eventlog.Log) {
		remove(l, find(t, l, 7, "authorised by db"))
	}, refused: "secureBoot", problem: "no key that verified"},
}

// certificates rewrites PCR 7: the firmware's variables by their digests, and then
// whatever the certificates allow.
func certificates(names ...string) func(p *BootPolicy) {
	return func(p *BootPolicy) {
		var allowed []Entry
		for _, e := range p.PCRs[7].Sequences[0] {
			_, cert, isAuthority := strings.Cut(e.Note, "; certificate ")
			switch {
			case !isAuthority:
				allowed = append(allowed, e)
			case strings.Contains(e.Note, names[0]):
				allowed = append(allowed, Entry{Form: FormCertificate, Value: cert})
			}
		}
		p.PCRs[7] = Rule{Allowed: allowed}
		p.SecureBoot = "" // which is judged first, and counts authorities too
	}
}

const otherCertificate = "\x30\x05\x02\x03evl"

var otherAuthority = variable(securityGUID, "db", strings.Repeat("o", 16)+otherCertificate)

// hashAuthority lets a program run by its hash: after the owner there is no certificate.
var hashAuthority = variable(securityGUID, "db", strings.Repeat("o", 16)+strings.Repeat("h", 32))

// likeAuthority has something like a certificate: a SET, and a SEQUENCE of an
// application's own.
func likeAuthority(tag byte) string {
	return variable(securityGUID, "db", strings.Repeat("o", 16)+string(tag)+otherCertificate[1:])
}

// wrapped is otherAuthority with a name of 2^63 more units, or 2^64 bytes.
var wrapped = otherAuthority[:23] + "\x80" + otherAuthority[24:]

// cut is otherAuthority with a value that is said to be one byte shorter.
var cut = otherAuthority[:24] + string(otherAuthority[24]-1) + otherAuthority[25:]

func allowOther(p *BootPolicy) { allowCertificate(otherCertificate)(p) }

func allowCertificate(certificate string) func(p *BootPolicy) {
	return func(p *BootPolicy) {
		certificates("SnakeOil")(p)
		r := p.PCRs[7]
		r.Allowed = append(r.Allowed, Entry{Form: FormCertificate, Value: fmt.Sprintf("%x", sha256.Sum256([]byte(certificate)))})
		p.PCRs[7] = r
	}
}

// signedBy replaces the authority.
func signedBy(typ eventlog.EventType, measured, data string) func(t *testing.T, l *eventlog.Log) {
	return func(t *testing.T, l *eventlog.Log) {
		l.Events[find(t, l, 7, "authorised by")] = measure(l, 7, typ, measured, data)
	}
}

var authorities = []forgery{
	{name: "authority by certificate", policy: certificates("SnakeOil"), forge: func(*testing.T, *eventlog.Log) {}},
	{name: "same certificate, other owner", policy: allowOther,
		forge: signedBy(eventlog.EFIVariableAuthority, variable(securityGUID, "db", strings.Repeat("p", 16)+otherCertificate), variable(securityGUID, "db", strings.Repeat("p", 16)+otherCertificate))},
	{name: "certificate without an owner", policy: allowOther,
		forge: signedBy(eventlog.EFIVariableAuthority, variable(securityGUID, "Shim", otherCertificate), variable(securityGUID, "Shim", otherCertificate))},
	{name: "other authority", policy: certificates("SnakeOil"), forge: signedBy(eventlog.EFIVariableAuthority, otherAuthority, otherAuthority),
		refused: "pcrs.7.allowed", problem: "key that signed the boot program is new"},
	{name: "further authority", policy: certificates("SnakeOil"), forge: func(_ *testing.T, l *eventlog.Log) {
		l.Append([]eventlog.Event{measure(l, 7, eventlog.EFIVariableAuthority, otherAuthority, otherAuthority)})
	}, refused: "pcrs.7.allowed"},
	{name: "other authority under another type", policy: certificates("SnakeOil"), forge: signedBy(eventlog.IPL, otherAuthority, otherAuthority),
		refused: "pcrs.7.allowed"},
	{name: "other authority, logged as an allowed one", policy: allowOther, forge: signedBy(eventlog.EFIVariableAuthority, "evil", otherAuthority),
		refused: "pcrs.7.allowed"},
	{name: "allowed certificate in no authority", policy: allowOther, forge: signedBy(eventlog.EFIVariableDriverConfig, otherAuthority, otherAuthority),
		refused: "pcrs.7.allowed"},
	{name: "bytes behind an allowed certificate", policy: allowOther,
		forge: signedBy(eventlog.EFIVariableAuthority, otherAuthority+"x", otherAuthority+"x"), refused: "pcrs.7.allowed"},
	{name: "a hash is no certificate", policy: allowCertificate(strings.Repeat("h", 32)), forge: signedBy(eventlog.EFIVariableAuthority, hashAuthority, hashAuthority),
		refused: "pcrs.7.allowed"},
	{name: "a SET is no certificate", policy: allowCertificate("\x31" + otherCertificate[1:]),
		forge: signedBy(eventlog.EFIVariableAuthority, likeAuthority(0x31), likeAuthority(0x31)), refused: "pcrs.7.allowed"},
	{name: "an application's SEQUENCE is no certificate", policy: allowCertificate("\x70" + otherCertificate[1:]),
		forge: signedBy(eventlog.EFIVariableAuthority, likeAuthority(0x70), likeAuthority(0x70)), refused: "pcrs.7.allowed"},
	{name: "allowed certificate behind a length that wraps", policy: allowOther, forge: signedBy(eventlog.EFIVariableAuthority, wrapped, wrapped),
		refused: "pcrs.7.allowed"},
	{name: "allowed certificate longer than its variable", policy: allowOther, forge: signedBy(eventlog.EFIVariableAuthority, cut, cut),
		refused: "pcrs.7.allowed"},
	{name: "GRUB host: shim's own certificate is no longer allowed", log: "shim-grub-secureboot", policy: certificates("Microsoft"),
		refused: "pcrs.7.allowed"},
}

// versions demands a version, and no list in PCR 0.
func versions(v ...string) func(p *BootPolicy) {
	return func(p *BootPolicy) {
		anyIn(0)(p)
		p.Firmware.Versions = v
	}
}

func otherVersion(measured, data string) func(t *testing.T, l *eventlog.Log) {
	return func(t *testing.T, l *eventlog.Log) {
		l.Events[find(t, l, 0, "firmware version")] = measure(l, 0, eventlog.CRTMVersion, measured, data)
	}
}

var firmware = []forgery{
	{name: "firmware's version", policy: versions("", "F2"), forge: otherVersion(wide("F2\x00"), wide("F2\x00"))},
	{name: "firmware's version in UTF-8", policy: versions("", "F2"), forge: otherVersion("F2", "F2")},
	{name: "other version", policy: versions(""), forge: otherVersion(wide("F1"), wide("F1")), refused: "firmware.versions", problem: "is not allowed"},
	{name: "other version, logged as an allowed one", policy: versions("", "F2"), forge: otherVersion(wide("F1"), wide("F2")),
		refused: "firmware.versions", problem: "is not allowed"},
	{name: "two versions", policy: versions("", "F2"), forge: func(t *testing.T, l *eventlog.Log) {
		insert(l, find(t, l, 0, "firmware version"), measure(l, 0, eventlog.CRTMVersion, "F1", "F1"))
	}, refused: "firmware.versions", problem: "is not allowed"},
	{name: "other version, and an allowed one after the separator", policy: versions("", "F2"), forge: func(t *testing.T, l *eventlog.Log) {
		remove(l, find(t, l, 0, "firmware version"))
		l.Append([]eventlog.Event{measure(l, 0, eventlog.CRTMVersion, "F2", "F2")})
	}, refused: "firmware.versions", problem: "none of the allowed"},
	{name: "no version", policy: versions(""), forge: func(t *testing.T, l *eventlog.Log) { remove(l, find(t, l, 0, "firmware version")) },
		refused: "firmware.versions", problem: "none of the allowed"},
	{name: "TPM started from another locality", forge: func(_ *testing.T, l *eventlog.Log) {
		insert(l, 0, eventlog.Informational(l.Banks, 0, []byte("StartupLocality\x00\x03")))
	}, refused: "firmware.startupLocality", problem: "another locality"},
	{name: "TPM started from another locality, anything allowed", policy: func(p *BootPolicy) { p.Firmware.StartupLocality = nil },
		forge: func(_ *testing.T, l *eventlog.Log) {
			insert(l, 0, eventlog.Informational(l.Banks, 0, []byte("StartupLocality\x00\x03")))
		}},
	{name: "claimed locality", lie: true, forge: func(_ *testing.T, l *eventlog.Log) {
		insert(l, 0, eventlog.Informational(l.Banks, 0, []byte("StartupLocality\x00\x03")))
	}, refused: "pcrs.0", problem: "do not lead"},
}

// allowList turns the list of a PCR into one without order.
func allowList(pcr int) func(p *BootPolicy) {
	return func(p *BootPolicy) { p.PCRs[pcr] = Rule{Allowed: p.PCRs[pcr].Sequences[0]} }
}

func otherImage(t *testing.T, l *eventlog.Log) {
	i := find(t, l, 4, "image")
	l.Events[i] = measure(l, 4, eventlog.EFIBootServicesApp, "other image", string(l.Events[i].UntrustedData))
}

func otherInitrd(t *testing.T, l *eventlog.Log) {
	i := find(t, l, 11, "section .initrd")
	l.Events[i] = measure(l, 11, eventlog.IPL, "other initrd", string(l.Events[i].UntrustedData))
}

// twoBoots adds the sequence of another image and initrd to PCR 11's.
func twoBoots(p *BootPolicy) {
	r := p.PCRs[11]
	other := append([]Entry(nil), r.Sequences[0]...)
	other[1] = Entry{FormDigest, fmt.Sprintf("%x", sha256.Sum256([]byte("other kernel"))), ""}
	other[7] = Entry{FormDigest, fmt.Sprintf("%x", sha256.Sum256([]byte("other initrd"))), ""}
	r.Sequences = append(r.Sequences, other)
	p.PCRs[11] = r
}

func swap(t *testing.T, l *eventlog.Log, pcr int, a, b string) {
	i, k := find(t, l, pcr, a), find(t, l, pcr, b)
	l.Events[i], l.Events[k] = l.Events[k], l.Events[i]
}

var lists = []forgery{
	{name: "other image", forge: otherImage, refused: "pcrs.4.sequences[0][2]", problem: "changed"},
	{name: "other initrd", forge: otherInitrd, refused: "pcrs.11.sequences[0][7]", problem: "initrd changed"},
	{name: "event more", forge: func(_ *testing.T, l *eventlog.Log) {
		l.Append([]eventlog.Event{measure(l, 11, eventlog.EventTag, "enter-initrd", "enter-initrd")})
	}, refused: "pcrs.11.sequences[0]", problem: "is new"},
	{name: "event twice", forge: func(t *testing.T, l *eventlog.Log) {
		i := find(t, l, 4, "image")
		insert(l, i, l.Events[i])
	}, refused: "pcrs.4.sequences[0]", problem: "is new"},
	{name: "event less", forge: func(t *testing.T, l *eventlog.Log) { remove(l, find(t, l, 5, "partition table")) },
		refused: "pcrs.5.sequences[0][1]", problem: "is gone"},
	{name: "other order", forge: func(t *testing.T, l *eventlog.Log) { swap(t, l, 11, "section .linux", "section .initrd") },
		refused: "pcrs.11.sequences[0][1]", problem: ""},
	{name: "event in another PCR", forge: func(t *testing.T, l *eventlog.Log) { l.Events[find(t, l, 4, "image")].PCR = 6 },
		refused: "pcrs.4.sequences[0][2]", problem: "is gone"},
	{name: "something in a PCR that was empty", policy: func(p *BootPolicy) { p.PCRs[14] = Rule{Sequences: [][]Entry{{}}} },
		forge: func(_ *testing.T, l *eventlog.Log) {
			l.Append([]eventlog.Event{measure(l, 14, eventlog.IPL, "key", "MokList\x00")})
		}, refused: "pcrs.14.sequences[0]", problem: "is new"},
	{name: "no order: other order and number", policy: allowList(11), forge: func(t *testing.T, l *eventlog.Log) {
		swap(t, l, 11, "section .linux", "section .initrd")
		l.Append([]eventlog.Event{l.Events[find(t, l, 11, "section .osrel")]})
	}},
	{name: "no order: the separator needs no entry", policy: func(p *BootPolicy) {
		p.PCRs[2] = Rule{Allowed: []Entry{{Form: FormText, Value: "nothing"}}}
	}, forge: func(*testing.T, *eventlog.Log) {}},
	{name: "no order: other initrd", policy: allowList(11), forge: otherInitrd, refused: "pcrs.11.allowed", problem: "initrd is new"},
	{name: "two sequences: the first", policy: twoBoots, forge: func(*testing.T, *eventlog.Log) {}},
	{name: "two sequences: the second", policy: twoBoots, forge: func(t *testing.T, l *eventlog.Log) {
		otherInitrd(t, l)
		i := find(t, l, 11, "section .linux")
		l.Events[i] = measure(l, 11, eventlog.IPL, "other kernel", string(l.Events[i].UntrustedData))
	}},
	{name: "two sequences: some of both", policy: twoBoots, forge: otherInitrd, refused: "pcrs.11.sequences[0][7]", problem: "initrd changed"},
}
