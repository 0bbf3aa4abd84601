package keyring_test

import (
	"bytes"
	"encoding/hex"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// TestAnchorBytes: the binary form is frozen, because NV indexes hold it.
func TestAnchorBytes(t *testing.T) {
	p := keyring.Anchor{ClusterID: seal.ClusterID(bytes.Repeat([]byte{7}, 16)), Revision: 258, KeyID: "k1-ceirceirceirceirceirceirceirceirceirceirceirceirceiq"}
	b, err := p.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	if want := strings.Repeat("07", 16) + "0000000000000102" + strings.Repeat("11", 32); hex.EncodeToString(b[:]) != want {
		t.Errorf("%x, want %s…", b, want)
	}
	if got, err := keyring.AnchorOf(b); err != nil || got != p {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := keyring.AnchorOf([keyring.AnchorBytes]byte{}); seal.CauseOf(err) != seal.CauseAnchor {
		t.Errorf("revision 0: %v", err)
	}
	p.Revision = keyring.MaxRevision + 1
	if b, err = p.Bytes(); err != nil {
		t.Fatal(err)
	}
	if _, err := keyring.AnchorOf(b); seal.CauseOf(err) != seal.CauseAnchor {
		t.Errorf("a revision over the limit: %v", err)
	}
	p.KeyID = "k1-short"
	if _, err := p.Bytes(); err == nil {
		t.Error("a malformed key ID has a binary form")
	}
}
