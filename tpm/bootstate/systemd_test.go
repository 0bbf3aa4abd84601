package bootstate_test

import (
	"bytes"
	"crypto"
	"errors"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/bootstate"
)

// TestSystemdMeasure: what systemd-measure signed is read, its digests are those of
// its PCR values, and its signatures verify where a TPM accepts them: this version
// signs the SHA-384 bank's states with SHA-384, which no TPM accepts.
func TestSystemdMeasure(t *testing.T) {
	for _, name := range []string{"rsa", "ecdsa"} {
		pub := publicKey(t, "systemd-252-"+name+".pub.pem")
		fingerprint, err := bootstate.KeyFingerprint(pub)
		if err != nil {
			t.Fatal(err)
		}
		want := measured(t, "systemd-252-"+name+".pcrs")
		f := parse(t, read(t, "systemd-252-"+name+".json"))
		seen := map[crypto.Hash]int{}
		for _, s := range f.States() {
			pcr := want[s.Bank][seen[s.Bank]]
			seen[s.Bank]++
			digest, err := authpolicy.ApprovedDigest(pcr)
			if err != nil || !bytes.Equal(digest, s.Digest) {
				t.Errorf("%s: %v: %x computed here (%v)", name, s, digest, err)
			}
			if s.KeyFingerprint != fingerprint {
				t.Errorf("%s: %v: pkfp %x, want %x", name, s, s.KeyFingerprint, fingerprint)
			}
			if len(s.PCRs) != 1 || s.PCRs[0] != 11 || len(s.Ref) != 0 || s.What != "" {
				t.Errorf("%s: %+v", name, s)
			}
			switch err := s.Verify(pub); {
			case s.Bank == crypto.SHA256 && err != nil:
				t.Errorf("%s: %v: %v", name, s, err)
			case s.Bank == crypto.SHA384 && (!errors.Is(err, bootstate.ErrSignature) || !strings.Contains(err.Error(), "SHA-256, whatever the bank")):
				t.Errorf("%s: %v: %v, want ErrSignature and why", name, s, err)
			}
		}
		if seen[crypto.SHA256] != 4 || seen[crypto.SHA384] != 4 {
			t.Errorf("%s: %v states, want 4 of each bank", name, seen)
		}
	}
}

// TestSystemdForm: our file equals systemd-measure's, byte for byte, and its pretty
// form is the same file.
func TestSystemdForm(t *testing.T) {
	b := read(t, "systemd-252-ecdsa.json")
	if got := marshal(t, parse(t, b)); !bytes.Equal(got, b) {
		t.Errorf("written as\n%s, read from\n%s", got, b)
	}
	pretty := parse(t, read(t, "systemd-252-pretty.json")).States()
	short := parse(t, read(t, "systemd-252-rsa.json")).States()
	if len(pretty) != 2 {
		t.Fatalf("%d states, want 2", len(pretty))
	}
	both := file(t, short...)
	merged, err := both.Merge(pretty...)
	if err != nil || len(merged.States()) != len(short) {
		t.Errorf("%d states after a merge with the same, want %d (%v)", len(merged.States()), len(short), err)
	}
}
