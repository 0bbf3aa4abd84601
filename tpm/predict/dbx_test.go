package predict

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"testing"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/simboot/peimage"
)

// hashes returns entries of a list of SHA-256 digests, of one owner.
func hashes(owner byte, names ...string) signatureList {
	l := signatureList{typ: certSHA256}
	for _, n := range names {
		sum := sha256.Sum256([]byte(n))
		l.entries = append(l.entries, append(bytes.Repeat([]byte{owner}, 16), sum[:]...))
	}
	return l
}

// signedDbx puts the header of a signed update before a payload.
func signedDbx(payload []byte) []byte {
	b := make([]byte, 16) // EFI_TIME
	signature := []byte("not verified here")
	b = binary.LittleEndian.AppendUint32(b, uint32(24+len(signature)))
	b = append(b, 0x00, 0x02, 0xf1, 0x0e)
	b = append(append(b, certPKCS7[:]...), signature...)
	return append(b, payload...)
}

// presentDbx is the content of the recorded boot's dbx.
func presentDbx(t testing.TB, log *eventlog.Log) []byte {
	v, ok := parseVariable(log.Events[find(t, log, 7, "dbx", 0)].UntrustedData)
	if !ok || len(v.data) != 76 {
		t.Fatalf("dbx of %d bytes", len(v.data))
	}
	return v.data
}

func TestDbx(t *testing.T) {
	log := readLog(t, "uki-secureboot")
	present := presentDbx(t, log)
	lists, err := parseDatabase(present)
	if err != nil {
		t.Fatal(err)
	}
	here := lists[0].entries[0]
	first, second := hashes(1, "a", "b"), hashes(1, "c")
	withOld := signatureList{typ: certSHA256, entries: [][]byte{first.entries[0], here, first.entries[1]}}
	certificate := signatureList{typ: certX509, entries: [][]byte{make([]byte, 300)}}
	for name, c := range map[string]struct{ file, content []byte }{
		"signed, all new":             {signedDbx(append(first.encode(), certificate.encode()...)), bytes.Join([][]byte{present, first.encode(), certificate.encode()}, nil)},
		"signed, partly there":        {signedDbx(append(withOld.encode(), second.encode()...)), bytes.Join([][]byte{present, first.encode(), second.encode()}, nil)},
		"signed, wholly there":        {signedDbx(present), present},
		"signed, of another owner":    {signedDbx(hashes(2, "a").encode()), append(bytes.Clone(present), hashes(2, "a").encode()...)},
		"the whole variable":          {append(first.encode(), present...), append(first.encode(), present...)},
		"the whole variable, no news": {present, present},
	} {
		t.Run(name, func(t *testing.T) {
			want := readLog(t, "uki-secureboot")
			data := variable{securityDatabase, "dbx", c.content}.encode()
			remeasure(want, find(t, want, 7, "dbx", 0), data, data)
			got, err := Predict(log, Change{Dbx: c.file})
			if err != nil {
				t.Fatal(err)
			}
			wantSame(t, got, want)
			if moved := !bytes.Equal(present, c.content); moved == (len(difference(got, log, 5)) == 0) {
				t.Errorf("moved: %v", moved)
			}
		})
	}
}

func TestDbxThatIsRefused(t *testing.T) {
	present := presentDbx(t, readLog(t, "uki-secureboot"))
	cut := hashes(1, "a").encode()
	for name, file := range map[string][]byte{
		"empty":                      {},
		"text":                       []byte("dbx"),
		"a copy from efivarfs":       append([]byte{7, 0, 0, 0}, present...),
		"cut off":                    cut[:len(cut)-1],
		"not the whole variable":     hashes(1, "a").encode(),
		"signed, and cut off":        signedDbx(cut[:len(cut)-1]),
		"signed, without a list":     signedDbx(nil),
		"signed, no whole header":    signedDbx(nil)[:50],
		"a list without entries":     append(bytes.Clone(certSHA256[:]), 28, 0, 0, 0, 0, 0, 0, 0, 48, 0, 0, 0),
		"entries of no size":         append(bytes.Clone(certSHA256[:]), 29, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1),
		"more than a variable has":   make([]byte, maxDatabase+1),
		"a header beyond the list":   append(bytes.Clone(certSHA256[:]), 76, 0, 0, 0, 255, 0, 0, 0, 48, 0, 0, 0),
		"a list shorter than itself": append(bytes.Clone(certSHA256[:]), 1, 0, 0, 0, 0, 0, 0, 0, 48, 0, 0, 0),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Predict(readLog(t, "uki-secureboot"), Change{Dbx: file})
			wantRefusal(t, err, "the dbx file")
		})
	}
}

func TestDbxOfLogsThatAreNotUnderstood(t *testing.T) {
	file := signedDbx(hashes(1, "a").encode())
	for name, change := range map[string]func(log *eventlog.Log, dbx int){
		"data that is not proven": func(log *eventlog.Log, dbx int) {
			log.Events[dbx].UntrustedData = variable{securityDatabase, "dbx", nil}.encode()
		},
		"no event":        func(log *eventlog.Log, dbx int) { log.Events = append(log.Events[:dbx:dbx], log.Events[dbx+1:]...) },
		"two events":      func(log *eventlog.Log, dbx int) { log.Events[dbx-1] = log.Events[dbx] },
		"of another type": func(log *eventlog.Log, dbx int) { log.Events[dbx].UntrustedType = eventlog.EFIVariableBoot },
		"not lists": func(log *eventlog.Log, dbx int) {
			data := variable{securityDatabase, "dbx", []byte("x")}.encode()
			remeasure(log, dbx, data, data)
		},
	} {
		t.Run(name, func(t *testing.T) {
			log := readLog(t, "uki-secureboot")
			change(log, find(t, log, 7, "dbx", 0))
			_, err := Predict(log, Change{Dbx: file})
			wantRefusal(t, err, "PCR 7")
		})
	}
}

// An image that the present or the next dbx names would not start.
func TestImageRevokedByDbx(t *testing.T) {
	base := baseUKI
	base.signer = signers().ca
	image := base.build(t)
	sum := sha256.Sum256(peimage.Hashed(image))
	revoke := signatureList{typ: certSHA256, entries: [][]byte{append(make([]byte, 16), sum[:]...)}}
	log := base.boot252(t, true)
	_, err := Predict(log, Change{Next: Files{UKI: image}, Dbx: signedDbx(revoke.encode())})
	wantRefusal(t, err, "revoked by dbx")
	data := variable{securityDatabase, "dbx", revoke.encode()}.encode()
	remeasure(log, find(t, log, 7, "dbx", 0), data, data)
	_, err = Predict(log, Change{Next: Files{UKI: image}})
	wantRefusal(t, err, "revoked by dbx")
}
