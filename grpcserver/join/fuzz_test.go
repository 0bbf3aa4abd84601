package join

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/beezy-dev/kleidi/seal"
	protocol "github.com/beezy-dev/kleidi/tpm/attest/exchange"
	"github.com/beezy-dev/kleidi/tpm/attest/joinproof"
)

// FuzzGrant: an accepted grant has only slots for the joining node, and files whose
// names lead nowhere else. No byte of it ends the process.
func FuzzGrant(f *testing.F) {
	for _, m := range []*FromVerifier{
		fromGrant(&Grant{Keyring: []byte("k"), Current: []seal.Slot{{Type: "tpm", Node: "beta", Data: []byte("{}")}}, Files: []File{{Name: "join.yaml", Content: []byte("x")}}}),
		fromChallenge(&protocol.Challenge{Nonce: []byte{1}}), {},
	} {
		b, err := proto.Marshal(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		m := new(FromVerifier)
		if proto.Unmarshal(b, m) != nil {
			return
		}
		g := toGrant(m.GetGrant())
		if g.check("beta") != nil {
			return
		}
		for _, s := range append(g.Current, g.Staged...) {
			if s.Node != "beta" || len(s.Data) > seal.MaxSlotData {
				t.Errorf("a slot of node %q with %d bytes", s.Node, len(s.Data))
			}
		}
		for _, file := range g.Files {
			if file.Name == "" || file.Name[0] == '.' || strings.ContainsAny(file.Name, "/\\\x00\n") {
				t.Errorf("a file named %q", file.Name)
			}
		}
	})
}

// FuzzHello: the first message, which anybody may send, reads back as it was sent.
func FuzzHello(f *testing.F) {
	b, err := proto.Marshal(fromHello(&joinproof.Hello{Node: "beta", EK: []byte("ek"), Terms: joinproof.Terms{Formats: []int{2}, PCRs: []int{7}}}))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		m := new(FromJoiner)
		if proto.Unmarshal(b, m) != nil || m.GetHello() == nil {
			return
		}
		h := toHello(m.GetHello())
		again := toHello(fromHello(h).GetHello())
		if string(again.Context()) != string(h.Context()) || again.Node != h.Node {
			t.Errorf("%+v reads as %+v", h, again)
		}
	})
}
