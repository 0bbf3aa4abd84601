package predict

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/simboot/peimage"
)

// readLog reads the log of a real boot.
func readLog(t testing.TB, name string) *eventlog.Log {
	t.Helper()
	raw, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	log, err := eventlog.Parse(raw)
	if err != nil {
		t.Fatal(err)
	}
	return log
}

// signers are made once, because making RSA keys takes time.
var signers = sync.OnceValue(func() (s struct{ ca, vendor, other *peimage.Signer }) {
	var err error
	for name, to := range map[string]**peimage.Signer{"CA": &s.ca, "Vendor": &s.vendor, "Other": &s.other} {
		if *to, err = peimage.NewSigner(name, nil); err != nil {
			panic(err)
		}
	}
	return s
})

func sign(t testing.TB, s *peimage.Signer, image []byte) []byte {
	t.Helper()
	signed, err := s.Sign(image)
	if err != nil {
		t.Fatal(err)
	}
	return signed
}

// remeasure changes the measurement of event i.
func remeasure(log *eventlog.Log, i int, measured, data []byte) {
	e := log.Events[i]
	log.Events[i] = eventlog.Measure(log.Banks, e.PCR, e.UntrustedType, measured, data)
}

// find returns the place of the n-th event of a PCR whose data contains the text,
// in UTF-8 or UTF-16.
func find(t testing.TB, log *eventlog.Log, pcr int, text string, n int) int {
	t.Helper()
	for i, e := range log.Events {
		if e.PCR == pcr && (bytes.Contains(e.UntrustedData, []byte(text)) || bytes.Contains(e.UntrustedData, toUTF16(text))) {
			if n == 0 {
				return i
			}
			n--
		}
	}
	t.Fatalf("no event of PCR %d with %q", pcr, text)
	return -1
}

// trust makes db hold these certificates, in this order, and makes event i the
// authority of the named one.
func trust(t testing.TB, log *eventlog.Log, db ...*x509.Certificate) {
	t.Helper()
	var content []byte
	for _, c := range db {
		content = append(content, signatureList{typ: certX509, entries: [][]byte{entry(c)}}.encode()...)
	}
	data := variable{securityDatabase, "db", content}.encode()
	remeasure(log, find(t, log, 7, "db", 0), data, data)
}

func entry(c *x509.Certificate) []byte { return append(make([]byte, 16), c.Raw...) }

// authorise makes the n-th authority event that of a certificate.
func authorise(log *eventlog.Log, n int, name string, c *x509.Certificate) {
	for i, e := range log.Events {
		if e.UntrustedType != eventlog.EFIVariableAuthority || bytes.Contains(e.UntrustedData, toUTF16("SbatLevel")) {
			continue
		}
		if n == 0 {
			data := variable{securityDatabase, name, entry(c)}.encode()
			remeasure(log, i, data, data)
			return
		}
		n--
	}
	panic("no such authority")
}

// wantSame demands that two logs have the same digests, in all banks, and lead to
// the same PCRs.
func wantSame(t testing.TB, got, want *eventlog.Log) {
	t.Helper()
	if !reflect.DeepEqual(got.Banks, want.Banks) {
		t.Fatalf("banks %v, want %v", got.Banks, want.Banks)
	}
	for _, b := range want.Banks {
		g, err := got.Replay(b)
		if err != nil {
			t.Fatal(err)
		}
		w, err := want.Replay(b)
		if err != nil {
			t.Fatal(err)
		}
		for pcr := range eventlog.NumPCRs {
			if !bytes.Equal(g[pcr], w[pcr]) {
				t.Errorf("%s PCR %d: %x, want %x\n%s", eventlog.BankName(b), pcr, g[pcr], w[pcr], difference(got, want, b))
			}
		}
	}
	if !reflect.DeepEqual(describe(got), describe(want)) {
		t.Errorf("described as\n%s\nwant\n%s", strings.Join(describe(got), "\n"), strings.Join(describe(want), "\n"))
	}
}

func describe(log *eventlog.Log) []string {
	var s []string
	for _, e := range log.Summarize(crypto.SHA256, []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14}) {
		s = append(s, fmt.Sprintf("%d %s %s %s", e.PCR, e.Type, e.What, e.Digest[:12]))
	}
	return s
}

func difference(got, want *eventlog.Log, b crypto.Hash) string {
	pcrs := []int{4, 7, 8, 9, 11, 12}
	var s []string
	for _, d := range eventlog.Compare(want.Summarize(b, pcrs), got.Summarize(b, pcrs), nil, nil) {
		s = append(s, d.String())
	}
	return strings.Join(s, "\n")
}

// wantRefusal demands a refusal whose text has all of these parts.
func wantRefusal(t testing.TB, err error, parts ...string) {
	t.Helper()
	r, ok := errors.AsType[*Refusal](err)
	if !ok {
		t.Fatalf("%v, want a refusal that says %q", err, parts)
	}
	if r.Hint == "" || strings.HasSuffix(r.Error(), ".") {
		t.Errorf("no next step: %v", err)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("%v, want %q", err, p)
		}
	}
}

// without returns the log without the events of a PCR.
func without(log *eventlog.Log, pcr int) *eventlog.Log {
	l := *log
	l.Events = slices.DeleteFunc(slices.Clone(log.Events), func(e eventlog.Event) bool { return e.PCR == pcr })
	return &l
}
