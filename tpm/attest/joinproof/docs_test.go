package joinproof

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/attest/exchange"
)

const protocolFile = "../../../docs/join-protocol.md"

// rows returns the two cells of each row of a table in a section of the page, whose first
// row is the head.
func rows(t *testing.T, section, head string) map[string]string {
	t.Helper()
	b, err := os.ReadFile(protocolFile)
	if err != nil {
		t.Fatal(err)
	}
	_, rest, found := strings.Cut(string(b), "\n"+section+"\n")
	_, rest, is := strings.Cut(rest, "\n"+head+"\n|---|---|\n")
	if !found || !is {
		t.Fatalf("%s has no table %s below %s", protocolFile, head, section)
	}
	table, _, _ := strings.Cut(rest, "\n\n")
	out := map[string]string{}
	for _, row := range regexp.MustCompile(`(?m)^\| ([^|]+) \| ([^|]+) \|$`).FindAllStringSubmatch(table, -1) {
		out[row[1]] = row[2]
	}
	return out
}

// TestDocumented compares the labels, the formulas and the sizes of the page with the
// code, both ways.
func TestDocumented(t *testing.T) {
	label := func(use string) []byte {
		for label, row := range rows(t, "### Labels", "| label | use |") {
			if row == use {
				return []byte(strings.Trim(label, "`"))
			}
		}
		t.Errorf("%s has no label for %s", protocolFile, use)
		return nil
	}
	if got := len(rows(t, "### Labels", "| label | use |")); got != 4 {
		t.Errorf("the page has %d labels", got)
	}
	if got := string(label("the value of the TLS connection")); got != purpose.Exporter {
		t.Errorf("the exporter's label is %s", got)
	}
	frame := func(fields ...[]byte) (b []byte) {
		for _, f := range fields {
			b = append(binary.BigEndian.AppendUint64(b, uint64(len(f))), f...)
		}
		return b
	}
	x := &exchange.Transcript{Cluster: seal.ClusterID{1}, Node: "beta", Nonce: []byte{2}, Exporter: []byte{3}, Context: []byte{4}, EK: []byte{5}, AK: []byte{6}, SRK: []byte{7}}
	digest := sha256.Sum256(frame(label("T"), x.Cluster[:], []byte(x.Node), x.Nonce, x.Exporter, x.Context, x.EK, x.AK, x.SRK))
	if !bytes.Equal(digest[:], purpose.Digest(x)) {
		t.Error("the transcript is not the documented one")
	}
	h := hmac.New(sha256.New, []byte("secret"))
	h.Write(frame(label("the proof that J's TPM holds EK and AK"), digest[:]))
	if !bytes.Equal(h.Sum(nil), purpose.Answer([]byte("secret"), digest[:])) {
		t.Error("the proof is not the documented one")
	}

	documented := rows(t, "### Limits", "| field | at most |")
	limits := map[string]string{
		"`node`":                           fmt.Sprintf("%d bytes", longestNode(t)),
		"`ek`, `ak`, `verifier`, `signer`": fmt.Sprintf("%d KiB", exchange.MaxKey>>10),
		"`ek_certificate`":                 fmt.Sprintf("%d KiB", exchange.MaxCertificate>>10),
		"`formats`":                        fmt.Sprint(maxFormats),
		"`ref`":                            fmt.Sprintf("%d bytes", maxRef),
		"`nonce`":                          fmt.Sprintf("%d bytes", exchange.NonceSize),
		"`credential`, `encrypted_secret`": fmt.Sprintf("%d KiB", exchange.MaxCredential>>10),
		"`attest`, `signature`":            fmt.Sprintf("%d KiB", exchange.MaxStatement>>10),
		"`firmware`, `userspace`, all parts together": fmt.Sprintf("%d MiB", exchange.MaxLog>>20),
	}
	for what, limit := range limits {
		if documented[what] != limit {
			t.Errorf("%s: %s: at most %s, not %q", protocolFile, what, limit, documented[what])
		}
	}
	for what := range documented {
		if limits[what] == "" {
			t.Errorf("%s: nothing limits %s", protocolFile, what)
		}
	}
}

// longestNode returns the length of the longest node name that a machine can claim.
func longestNode(t *testing.T) (n int) {
	t.Helper()
	for l := 1; l < 1000; l++ {
		c := exchange.Claims{Cluster: cluster[:], Node: strings.Repeat("n", l), EK: []byte{1}, AK: []byte{1}, SRK: make([]byte, exchange.NameSize)}
		if c.Check() == nil {
			n = l
		}
	}
	return n
}
