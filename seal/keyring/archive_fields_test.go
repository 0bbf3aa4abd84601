package keyring

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/seal"
)

// TestArchiveFields: an archive with a good MAC is refused, too, if a field is malformed.
func TestArchiveFields(t *testing.T) {
	u := must[*UntrustedArchive](t)(ParseArchive(golden2(t, "archive.json")))
	for what, tc := range map[string]struct {
		change func(*archive1)
		want   string
	}{
		"the golden one":    {func(*archive1) {}, ""},
		"another format":    {func(d *archive1) { d.Format = 2 }, "format is 2"},
		"no key ID":         {func(d *archive1) { d.KeyID = "k1-short" }, "malformed key ID"},
		"no key ID of MAC":  {func(d *archive1) { d.By = "k1-short" }, "malformed key ID"},
		"of itself":         {func(d *archive1) { d.By = d.KeyID }, "the one that was current"},
		"no slots":          {func(d *archive1) { d.Slots = nil }, "0 slots"},
		"too many slots":    {func(d *archive1) { d.Slots = make([]seal.Slot, MaxSlots+1) }, "want 1 to"},
		"a node's slot":     {func(d *archive1) { d.Slots[0].Node = "cp-1" }, "slots[0]: no recovery slot"},
		"a slot too large":  {func(d *archive1) { d.Slots[0].Data = make([]byte, seal.MaxSlotData+1) }, "slots[0]: no recovery slot"},
		"a slot of a token": {func(d *archive1) { d.Slots[0].Type = "pkcs11" }, "slots[0]: no recovery slot"},
	} {
		d := *u.doc
		d.Slots = cloneSlots(u.doc.Slots)
		tc.change(&d)
		err := d.check()
		if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
			t.Errorf("%s: %v, want %q", what, err, tc.want)
		}
	}
}

// TestArchiveOrigin: an archive with a MAC of another length does not parse. An archive of
// another cluster is refused as such: no operator may vouch for it.
func TestArchiveOrigin(t *testing.T) {
	u := must[*UntrustedArchive](t)(ParseArchive(golden2(t, "archive.json")))
	short := must[[]byte](t)(encode(archiveEnvelope{Archive: u.raw, MAC: u.mac[:len(u.mac)-1]}))
	if _, err := ParseArchive(append(short, '\n')); err == nil || !strings.Contains(err.Error(), "mac has 31 bytes") {
		t.Error(err)
	}
	foreign := must[*Keyring](t)(New(seal.ClusterID{9}, newKEK(t, 0x33), []seal.Slot{{Type: "vault", Data: []byte("{}")}}, []Node{{Name: "cp-1"}}, time.Now()))
	defer foreign.Close()
	if err := u.Verify(foreign); err == nil || errors.Is(err, ErrForeignArchive) || !strings.Contains(err.Error(), "of cluster") {
		t.Error(err)
	}
}
