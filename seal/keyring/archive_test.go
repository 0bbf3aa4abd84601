package keyring

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/seal"
)

// TestGoldenArchive: Archive writes the same bytes as another implementation, and
// Unarchive brings the KEK back.
func TestGoldenArchive(t *testing.T) {
	k := golden2Keyring(t)
	raw := golden2(t, "archive.json")
	u := must[*UntrustedArchive](t)(ParseArchive(raw))
	if err := u.Verify(k); err != nil {
		t.Fatal(err)
	}
	id := u.Info().KeyID
	if id != k.Info().Retired[0].KeyID || u.Info().By != k.CurrentID() || names(u.Slots()) != "archived, recovery" {
		t.Errorf("%+v", u.Info())
	}
	if again := must[[]byte](t)(Archive(k, id, u.Slots())); !bytes.Equal(again, raw) {
		t.Errorf("it is written as %s", again)
	}
	pruned := must[*Keyring](t)(k.Prune(id))
	defer pruned.Close()
	back := must[*Keyring](t)(Unarchive(pruned, u, newKEK(t, 0x01)))
	defer back.Close()
	if !back.Holds(id) || back.Info().Retired[0] != k.Info().Retired[0] || back.Revision() != k.Revision()+2 {
		t.Errorf("%+v", back.Info())
	}
	kek := must[*seal.Secret](t)(RetiredKEK(back, id, seal.Memory{}))
	defer kek.Close()
	if NewKeyID(back.ClusterID(), kek) != id {
		t.Error("the KEK that came back is another one")
	}
	must[*Keyring](t)(open(back.Marshal(), newKEK(t, 0x81), nil)).Close()
}

// TestArchiveRefused: an archive with any change is refused, and an archive puts back
// only the KEK of its key ID, into the keyring of its cluster.
func TestArchiveRefused(t *testing.T) {
	k := golden2Keyring(t)
	raw := golden2(t, "archive.json")
	for i := range raw {
		changed := bytes.Clone(raw)
		changed[i] ^= 1
		if u, err := ParseArchive(changed); err == nil && u.Verify(k) == nil {
			t.Fatalf("byte %d can be changed", i)
		}
	}
	for _, b := range [][]byte{nil, raw[:len(raw)-1], append(bytes.Clone(raw), '\n'), make([]byte, MaxArchiveSize+1)} {
		if _, err := ParseArchive(b); err == nil {
			t.Errorf("%.20q parses", b)
		}
	}
	u := must[*UntrustedArchive](t)(ParseArchive(raw))
	id := u.Info().KeyID
	pruned := must[*Keyring](t)(k.Prune(id))
	defer pruned.Close()
	stranger := must[*Keyring](t)(New(k.ClusterID(), newKEK(t, 0x33), []seal.Slot{{Type: "vault", Data: []byte("{}")}}, []Node{{Name: "cp-1"}}, time.Now()))
	defer stranger.Close()
	if err := u.Verify(stranger); !errors.Is(err, ErrForeignArchive) {
		t.Errorf("a keyring without the KEK of the MAC: %v", err)
	}
	foreign := must[*Keyring](t)(New(seal.ClusterID{9}, newKEK(t, 0x33), []seal.Slot{{Type: "vault", Data: []byte("{}")}}, []Node{{Name: "cp-1"}}, time.Now()))
	defer foreign.Close()
	full := pruned
	for i := len(pruned.Info().Retired); i < MaxRetired-1; i++ { // the staged KEK takes the last place
		kek := must[*seal.Secret](t)(seal.Memory{}.NewKEK())
		defer kek.Close()
		other := must[*UntrustedArchive](t)(ParseArchive(raw))
		other.doc.KeyID = NewKeyID(k.ClusterID(), kek)
		full = must[*Keyring](t)(Unarchive(full, other, kek))
		defer full.Close()
	}
	over := must[*Keyring](t)(full.Abort(time.Now()))
	defer over.Close()
	for what, tc := range map[string]struct {
		err  error
		want string
	}{
		"the KEK is there":   {errOf(Unarchive(k, u, newKEK(t, 0x01))), "the keyring holds key ID"},
		"another KEK":        {errOf(Unarchive(pruned, u, newKEK(t, 0x02))), "holds a KEK other than"},
		"another cluster":    {errors.Join(u.Verify(foreign), errOf(Unarchive(foreign, u, newKEK(t, 0x01)))), "of cluster"},
		"no room":            {errOf(Unarchive(over, u, newKEK(t, 0x01))), fmt.Sprintf("holds %d retired KEKs, and no more fit", MaxRetired)},
		"a rotation's place": {errOf(Unarchive(full, u, newKEK(t, 0x01))), fmt.Sprintf("holds %d retired KEKs and a staged one", MaxRetired-1)},
		"of the current KEK": {errOf(Archive(k, k.CurrentID(), u.Slots())), "not that of a retired KEK"},
		"without slots":      {errOf(Archive(k, id, nil)), "0 slots"},
		"of another wrapper": {errOf(Archive(k, id, []seal.Slot{{Type: "vault", Data: []byte("{}")}})), "no recovery slot"},
		"a KEK that is gone": {errOf(RetiredKEK(pruned, id, seal.Memory{})), "not that of a retired KEK"},
		"an archive of it":   {errOf(Archive(pruned, id, u.Slots())), "not that of a retired KEK"},
	} {
		if tc.err == nil || !strings.Contains(tc.err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", what, tc.err, tc.want)
		}
	}
}
