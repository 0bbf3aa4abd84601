package verifierd

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/grpcserver/verifier"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/tpm/attest/remote"
)

// TestMetricsAreDocumented compares docs/remote-attestation.md with the served metrics.
func TestMetricsAreDocumented(t *testing.T) {
	h := newHealth(&auditFile{files.Log{Path: filepath.Join(t.TempDir(), "audit.log")}}, 0)
	if _, err := verifier.NewServer(verifier.Options{Verifier: &remote.Verifier{}, Registerer: h.registry}); err != nil {
		t.Fatal(err)
	}
	families, err := h.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile(filepath.Join("..", "..", "docs", "remote-attestation.md"))
	if err != nil {
		t.Fatal(err)
	}
	live, documented := map[string]bool{"kleidi_verifier_accepted_timestamp_seconds": true}, map[string]bool{} // this metric has no series yet
	for _, f := range families {
		if strings.HasPrefix(f.GetName(), "kleidi_") {
			live[f.GetName()] = true
		}
	}
	for _, m := range regexp.MustCompile("(?m)^\\| `(kleidi_\\w+)` \\|").FindAllStringSubmatch(string(page), -1) {
		documented[m[1]] = true
		if !live[m[1]] {
			t.Errorf("%s does not exist", m[1])
		}
	}
	rules, err := os.ReadFile(filepath.Join("..", "..", "deploy", "prometheus-rules-verifier.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range regexp.MustCompile(`kleidi_verifier_\w+`).FindAllString(string(rules), -1) {
		if !live[name] {
			t.Errorf("an alert uses %s, which does not exist", name)
		}
	}
	for _, m := range regexp.MustCompile(`alert: (\w+)`).FindAllStringSubmatch(string(rules), -1) {
		if !strings.Contains(string(page), "| "+m[1]+" |") {
			t.Errorf("the document does not say what to do about %s", m[1])
		}
	}
	for name := range live {
		if !documented[name] {
			t.Errorf("%s is not in the document", name)
		}
	}
}
