package inspect

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/hex"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
	"github.com/beezy-dev/kleidi/tpm/bootstate"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

func write(t *testing.T, name string, b []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestParseNonce: a nonce that can be guessed or that no TPM takes is refused. Without one,
// each call makes another.
func TestParseNonce(t *testing.T) {
	for text, ok := range map[string]bool{
		strings.Repeat("0a", minNonce): true, strings.Repeat("0a", maxNonce): true,
		strings.Repeat("0a", minNonce-1): false, strings.Repeat("0a", maxNonce+1): false,
		strings.Repeat("0a", minNonce) + "0": false, strings.Repeat("0g", minNonce): false,
	} {
		b, err := ParseNonce(text)
		if ok && (err != nil || hex.EncodeToString(b) != text) || !ok && err == nil {
			t.Errorf("%q: %x, %v", text, b, err)
		}
	}
	a, err := ParseNonce("")
	if err != nil {
		t.Fatal(err)
	}
	if b, err := ParseNonce(""); err != nil || len(a) < minNonce || bytes.Equal(a, b) {
		t.Errorf("%x and %x, %v", a, b, err)
	}
}

// policyOf returns a boot policy of PCR 0, and the log that it was recorded from.
func policyOf(t *testing.T, version string) (*bootpolicy.BootPolicy, *eventlog.Log) {
	t.Helper()
	banks := []crypto.Hash{crypto.SHA256}
	log := &eventlog.Log{Banks: banks, Events: []eventlog.Event{
		eventlog.Measure(banks, 0, eventlog.CRTMVersion, []byte(version), []byte(version)),
		eventlog.Measure(banks, 0, eventlog.Separator, make([]byte, 4), make([]byte, 4)),
	}}
	p, err := bootpolicy.Record(log, crypto.SHA256, []int{0})
	if err != nil {
		t.Fatal(err)
	}
	return p, log
}

// TestReadPCRs: only the values of the boot policy's bank count.
func TestReadPCRs(t *testing.T) {
	p, _ := policyOf(t, "1")
	for name, row := range map[string]struct {
		text string
		want int
		says string
	}{
		"its bank":      {`{"sha256": {"0": "aa", "4": "bb"}, "sha1": {"7": "cc"}}`, 2, ""},
		"another bank":  {`{"sha1": {"0": "aa"}}`, 0, ""},
		"no JSON":       {`sha256`, 0, `want {"sha256": {"4": "…"}}`},
		"no digest":     {`{"sha256": {"4": "xx"}}`, 0, "PCR 4: "},
		"no PCR number": {`{"sha256": {"four": "aa"}}`, 0, `want {"sha256": {"4": "…"}}`},
	} {
		pcrs, err := readPCRs(write(t, "pcrs.json", []byte(row.text)), p)
		if row.says == "" && (err != nil || len(pcrs) != row.want) || row.says != "" && (err == nil || !strings.Contains(err.Error(), row.says)) {
			t.Errorf("%s: %v, %v", name, pcrs, err)
		}
	}
}

// TestJudgeLog: a log of another boot, and values that the log does not lead to, are refused
// by findings. A file that can't be read is an error.
func TestJudgeLog(t *testing.T) {
	p, log := policyOf(t, "1")
	_, changed := policyOf(t, "2")
	policy := write(t, "policy.yaml", p.Marshal())
	same, other := attest.Logs{Firmware: write(t, "log", log.Encode())}, attest.Logs{Firmware: write(t, "log", changed.Encode())}
	wrong := write(t, "pcrs.json", []byte(`{"sha256": {"0": "`+strings.Repeat("00", 32)+`"}}`))
	for name, row := range map[string]struct {
		logs     attest.Logs
		values   string
		accepted bool
	}{"the recorded boot": {same, "", true}, "another boot": {other, "", false}, "values of another boot": {same, wrong, false}} {
		v, err := JudgeLog(policy, row.logs, row.values)
		if err != nil || v.Accepted != row.accepted || (len(v.Findings) == 0) != row.accepted {
			t.Errorf("%s: %+v, %v", name, v, err)
		}
	}
	missing := filepath.Join(t.TempDir(), "none")
	for name, f := range map[string]func() error{
		"no policy": func() error { _, err := JudgeLog(missing, same, ""); return err },
		"no log":    func() error { _, err := JudgeLog(policy, attest.Logs{Firmware: missing}, ""); return err },
		"no values": func() error { _, err := JudgeLog(policy, same, missing); return err },
	} {
		if err := f(); err == nil || !strings.Contains(err.Error(), missing) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestJudgeEvidence: a file that is no evidence is refused with the command that makes one.
func TestJudgeEvidence(t *testing.T) {
	p, log := policyOf(t, "1")
	policy, file := write(t, "policy.yaml", p.Marshal()), write(t, "evidence", log.Encode())
	if v, err := JudgeEvidence(policy, file, ""); err == nil || !strings.Contains(err.Error(), "want what kleidi bootpolicy evidence writes") {
		t.Errorf("%+v, %v", v, err)
	}
}

// TestListStates: a signed boot state has a slot only if a slot has its key and its
// generation. A file that does not exist has no states.
func TestListStates(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := seal.ClusterID{1}, seal.ClusterID{2}
	signed := func(cluster seal.ClusterID, generation uint64) bootstate.State {
		s, err := bootstate.Sign(key, authpolicy.PCR{Bank: crypto.SHA256, Values: map[int][]byte{11: bytes.Repeat([]byte{1}, 32)}}, bootstate.Ref(cluster, generation), "a kernel")
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	f, err := bootstate.New(signed(ours, 1), signed(ours, 2), signed(theirs, 2))
	if err != nil {
		t.Fatal(err)
	}
	b, err := f.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	fingerprint, err := bootstate.KeyFingerprint(key.Public())
	if err != nil {
		t.Fatal(err)
	}
	path := write(t, "states.json", b)
	r := admin.StatusReport{ClusterID: ours.String(), Slots: []admin.SlotReport{{Signer: hex.EncodeToString(fingerprint[:]), Generation: 2}, {Signer: "another", Generation: 1}}}
	states, err := ListStates([]string{filepath.Join(t.TempDir(), "none"), path}, r)
	if err != nil || len(states) != 3 {
		t.Fatalf("%+v, %v", states, err)
	}
	counting := 0
	for _, s := range states {
		if s.File != path || s.Bank != "sha256" || s.What != "a kernel" || len(s.PCRs) != 1 {
			t.Errorf("%+v", s)
		}
		if s.Counts {
			counting++
			if s.Generation != 2 {
				t.Errorf("%+v", s)
			}
		}
	}
	if counting != 1 {
		t.Errorf("%d states count: %+v", counting, states)
	}
	none := admin.StatusReport{Problem: &admin.Problem{Message: "there is no keyring", Hint: "run kleidi init"}}
	if _, err := ListStates([]string{path}, none); err == nil || !strings.Contains(err.Error(), "run kleidi init") {
		t.Errorf("without a keyring: %v", err)
	}
	if _, err := ListStates([]string{write(t, "bad.json", []byte("{"))}, r); err == nil || !strings.Contains(err.Error(), "bad.json") {
		t.Errorf("a damaged file: %v", err)
	}
}
