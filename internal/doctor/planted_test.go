package doctor

import (
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/internal/doctor/diagnosis"
)

// notPlanted are the kinds of findings of which no test plants the fault on a real node, with
// the reason. The tables of this package plant them as facts.
var notPlanted = map[string]string{
	"tpm/version-1.2":                    "no TPM 1.2 is simulated",
	"pcrs/unmeasured":                    "kleidi seals to no such PCR; only a keyring of an earlier version can have it",
	"memory/core":                        "kleidi serve sets the limit itself, and needs CAP_SYS_RESOURCE to raise it again",
	"memory/process":                     "kleidi serve refuses to start without locked memory, unless memory.lock is best-effort",
	"memory/unlocked":                    "memfd_secret and mlock are both there where tests run",
	"keyslots/warning":                   "only Vault gives warnings; its server is in e2e/vault, which tests them",
	"token/pin-locked":                   "SoftHSM locks no PIN; the tests of hsm have a token that does",
	"token/pin-final-try":                "SoftHSM locks no PIN; the tests of hsm have a token that does",
	"vault/token":                        "Vault's server is in e2e/vault; the tests of vault ask one that answers in its form",
	"retired-keks/many":                  "it takes as many rotations; the table plants the keyring as a fact",
	"retired-keks/full":                  "it takes as many rotations; the table plants the keyring as a fact",
	"kube-apiserver/old":                 "the oldest kube-apiserver in the tests is 1.29, which has KMS v2",
	"kube-apiserver/never-called":        "a kube-apiserver that calls kleidi is in other suites",
	"kube-apiserver/stale":               "it takes five minutes without an answer",
	"kube-apiserver/errors":              "a kube-apiserver that calls kleidi is in other suites",
	"kube-apiserver/key-ids":             "kleidi gives kube-apiserver no key ID that it refuses",
	"kube-apiserver/other-configuration": "a kube-apiserver that calls kleidi is in other suites",
	"clock/behind":                       "the clock is that of the machine that runs the tests",
	"clock/unsynchronised":               "the clock is that of the machine that runs the tests",
	"leftovers/rotation":                 "a rotation is left over after a day",
	"cluster-store/certificate":          "kube-apiserver's test double signs no certificates",
	"nodes/version":                      "all nodes run the same binary",
}

var (
	scene   = regexp.MustCompile(`(?m)^(?:on \S+ )?doctor (?:finds|mends|comes-to)((?: [a-z-]+/\S+)+)`)
	machine = regexp.MustCompile(`kinds: \[\]string\{([^}]*)\}`)
)

// TestPlanted: at least forty kinds of faults are planted on a node that runs: by scenes of
// the binary, and on a machine with a real systemd. For each of the others there is a reason.
func TestPlanted(t *testing.T) {
	planted := map[string]bool{}
	add := func(pattern string, form *regexp.Regexp) {
		names, _ := filepath.Glob(pattern)
		for _, name := range names {
			b, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range form.FindAllStringSubmatch(string(b), -1) {
				for _, id := range strings.FieldsFunc(m[1], func(r rune) bool { return strings.ContainsRune(` ,"`, r) }) {
					planted[id] = true
				}
			}
		}
	}
	add("../../cmd/kleidi/testdata/script/doctor*.txtar", scene)
	add("../../e2e/packages/doctor_test.go", machine)
	for _, id := range slices.Sorted(maps.Keys(diagnosis.Kinds)) {
		if reason := notPlanted[id]; planted[id] == (reason != "") {
			t.Errorf("%s: planted: %t, the reason why not: %q", id, planted[id], reason)
		}
	}
	for _, id := range slices.Concat(slices.Collect(maps.Keys(planted)), slices.Collect(maps.Keys(notPlanted))) {
		if _, ok := diagnosis.Kinds[id]; !ok {
			t.Errorf("there is no kind %s", id)
		}
	}
	if len(planted) < 40 {
		t.Errorf("only %d kinds are planted", len(planted))
	}
	t.Logf("%d of %d kinds of faults are planted on a real node", len(planted), len(diagnosis.Kinds))
}
