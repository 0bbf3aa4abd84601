package keyring_test

import (
	"fmt"
	"os"
	"regexp"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/recovery"
)

const formatFile = "../../docs/keyring-format.md"

// TestLimitsAreDocumented compares the table of docs/keyring-format.md with the
// constants, both ways.
func TestLimitsAreDocumented(t *testing.T) {
	b, err := os.ReadFile(formatFile)
	if err != nil {
		t.Fatal(err)
	}
	section := regexp.MustCompile(`(?s)\n### Limits\n(.*?)\n##`).FindSubmatch(b)
	if section == nil {
		t.Fatalf("%s has no section Limits", formatFile)
	}
	documented := map[string]string{}
	for _, row := range regexp.MustCompile(`(?m)^\| ([^|]+) \| (\d[^|]*) \|$`).FindAllStringSubmatch(string(section[1]), -1) {
		documented[row[1]] = row[2]
	}
	limits := map[string]string{
		"the file":         fmt.Sprintf("%d MiB", keyring.MaxSize>>20),
		"`data` of a slot": fmt.Sprintf("%d KiB", seal.MaxSlotData>>10),
		"slots of one KEK for each node, and without a node": fmt.Sprint(keyring.MaxSlots),
		"retired KEKs":                     fmt.Sprint(keyring.MaxRetired),
		"nodes":                            fmt.Sprint(keyring.MaxNodes),
		"`revision`":                       fmt.Sprintf("%d (2⁵³−1)", uint64(keyring.MaxRevision)),
		"DEK seed":                         fmt.Sprintf("%d bytes", keyring.MaxPlaintext),
		"ciphertext of a DEK seed":         fmt.Sprintf("%d bytes", keyring.MaxCiphertext),
		"`srk` of a node (format 2)":       fmt.Sprintf("%d bytes", keyring.MaxSRK),
		"record":                           fmt.Sprintf("%d KiB", keyring.MaxRecordSize>>10),
		"text in a record":                 fmt.Sprintf("%d bytes", keyring.MaxText),
		"boot states of a record":          fmt.Sprint(keyring.MaxSlots),
		"PCRs of a boot state in a record": fmt.Sprint(keyring.MaxPCRs),
		"public area of a key in a record": fmt.Sprintf("%d bytes", keyring.MaxKeyArea),
		"`ref` of a key in a record":       fmt.Sprintf("%d bytes", keyring.MaxRef),
		"anchor":                           fmt.Sprintf("%d bytes", keyring.MaxAnchorSize),
		"archive":                          fmt.Sprintf("%d KiB", keyring.MaxArchiveSize>>10),
		"recipients of a recovery slot":    fmt.Sprint(recovery.MaxRecipients),
	}
	for what, limit := range limits {
		if documented[what] != limit {
			t.Errorf("%s: %s: at most %s, not %q", formatFile, what, limit, documented[what])
		}
	}
	for what := range documented {
		if limits[what] == "" {
			t.Errorf("%s: nothing limits %s", formatFile, what)
		}
	}
}
