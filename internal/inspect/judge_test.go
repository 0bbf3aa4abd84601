package inspect

import (
	"crypto"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// TestCheckReplaysTwice: a saved log that yields the values only in our own replay is
// refused, as by the gate.
func TestCheckReplaysTwice(t *testing.T) {
	banks := []crypto.Hash{crypto.SHA256}
	log := &eventlog.Log{Banks: banks, Events: []eventlog.Event{
		eventlog.Measure(banks, 0, eventlog.CRTMVersion, []byte("1"), []byte("1")),
		eventlog.Measure(banks, 0, eventlog.Separator, make([]byte, 4), make([]byte, 4)),
	}}
	p, err := bootpolicy.Record(log, crypto.SHA256, []int{0})
	if err != nil {
		t.Fatal(err)
	}
	claimed, err := p.Claimed(log)
	if err != nil {
		t.Fatal(err)
	}
	values, err := json.Marshal(map[string]map[int]string{"sha256": {0: hex.EncodeToString(claimed[0])}})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	policy, pcrs := write("policy.yaml", p.Marshal()), write("pcrs.json", values)
	logs := attest.Logs{Firmware: write("log", log.Encode())}
	if v, err := JudgeLog(policy, logs, pcrs); err != nil || !v.Accepted {
		t.Fatalf("%v, %v", v, err)
	}
	log.Events = slices.Insert(log.Events, 0, eventlog.Informational(banks, 0, []byte("StartupLocality!\x03")))
	write("log", log.Encode())
	if v, err := JudgeLog(policy, logs, pcrs); err == nil || !strings.Contains(err.Error(), "go-attestation's replay disagrees") {
		t.Errorf("%v, %v", v, err)
	}
	if v, err := JudgeLog(policy, logs, ""); err != nil || !v.Accepted {
		t.Errorf("at its word: %v, %v", v, err)
	}
}
