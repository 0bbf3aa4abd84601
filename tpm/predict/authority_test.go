package predict

import (
	"bytes"
	"crypto/sha256"
	"testing"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/simboot/peimage"
)

// The digest also covers bytes behind the sections.
func TestDigestCoversWhatFollowsTheSections(t *testing.T) {
	image := append(peimage.Kernel("6.1.0", "x"), "symbols of a linker"...)
	for name, file := range map[string][]byte{"not signed": image, "signed": sign(t, signers().ca, image)} {
		img, err := parsePE(file)
		if err != nil {
			t.Fatal(err)
		}
		if want := sha256.Sum256(peimage.Hashed(file)); !bytes.Equal(img.digest(5), want[:]) {
			t.Errorf("%s: another digest", name)
		}
	}
}

// Signatures that are not what they seem.
func TestForgedSignatures(t *testing.T) {
	ca := signers().ca
	base := baseUKI
	base.signer = ca
	log := base.boot252(t, true)
	image := base.build(t)
	unsigned, other := baseUKI.build(t), baseUKI
	other.kernel = "6.1.0-57-amd64"
	was, is := sha256.Sum256(peimage.Hashed(unsigned)), sha256.Sum256(peimage.Hashed(other.build(t)))

	flipped := bytes.Clone(image)
	flipped[len(flipped)-20] ^= 1
	table := bytes.Replace(image[len(unsigned):], was[:], is[:], 1)
	moved := sign(t, ca, other.build(t)) // with the table's place and size, which are the same
	if len(moved) != len(image) {
		t.Fatal("tables of different sizes")
	}
	moved = append(moved[:len(moved)-len(table)], table...)
	namesake, err := peimage.NewSigner("CA", nil)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := peimage.NewSigner("leaf", namesake)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		image []byte
		says  string
	}{
		"another signature":                       {flipped, "does not verify"},
		"the digest in a signature replaced":      {moved, "does not verify"},
		"a certificate of an issuer of that name": {sign(t, leaf, unsigned), "no authority"},
		"a self-signed certificate of that name":  {sign(t, namesake, unsigned), "no authority"},
		"a table that is not at the end":          {append(bytes.Clone(image), make([]byte, 8)...), "not at the end"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Predict(log, Change{Next: Files{UKI: c.image}})
			wantRefusal(t, err, c.says)
		})
	}
	if _, err := Predict(log, Change{Next: Files{UKI: sign(t, ca, sign(t, ca, unsigned))}}); err != nil {
		t.Errorf("signed twice: %v", err)
	}
}

// An authority that the log claims without a proving digest authorises nothing.
func TestClaimedAuthority(t *testing.T) {
	base, next := baseUKI, baseUKI
	base.signer, next.signer = signers().ca, signers().other
	log := base.boot252(t, true)
	trust(t, log, signers().other.Cert, signers().ca.Cert)
	_, err := Predict(log, Change{Next: Files{UKI: next.build(t)}})
	wantRefusal(t, err, "PCR 7", "another authority")
	for i, e := range log.Events {
		if e.UntrustedType == eventlog.EFIVariableAuthority {
			log.Events[i].UntrustedData = variable{securityDatabase, "db", entry(signers().other.Cert)}.encode()
		}
	}
	_, err = Predict(log, Change{Next: Files{UKI: next.build(t)}})
	wantRefusal(t, err, "PCR 7", "no proven authority")
}
