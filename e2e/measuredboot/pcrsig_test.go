package measuredboot

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"os"
	"testing"

	"github.com/beezy-dev/kleidi/e2e/measuredboot/guest/wire"
	"github.com/beezy-dev/kleidi/seal"
)

// TestPCRSignature boots images with signed values of PCR 11, as ukify and
// systemd-measure make them. The test computes the values from the parts of the images,
// without kleidi's own code.
func TestPCRSignature(t *testing.T) {
	t.Parallel()
	m := newMachine(t, shared, ownKeys)
	key := must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 2048))
	first := withSignature(t, key, uki)
	second := withSignature(t, key, with(next, func(i *image) { i.uname = "" }))
	unsigned := with(second, func(i *image) { i.sections = map[string][]byte{".pcrpkey": publicKey(t, key)} })
	moved := []int{4, 9, 11}
	m.series("UKI with .pcrsig", []boot{
		{what: "signed PCR 11 in the image; kleidi bootstate add --systemd", image: first, first: []wire.Step{initialize},
			then: []wire.Step{kleidi("bootstate", "add", "--systemd")}, want: opens},
		{what: "next image, signed by the same key; no command run", image: second, want: opens, moved: moved},
		{what: "the same image without the signature", image: unsigned, want: locked, cause: seal.CauseBootState, moved: moved, says: []string{"PCR 4"}},
		{what: "next image, signed by another key", image: withSignature(t, must[*rsa.PrivateKey](t)(rsa.GenerateKey(rand.Reader, 2048)), second),
			want: locked, cause: seal.CauseBootState, moved: moved, says: []string{"PCR 4"}},
		{what: "signed, Secure Boot off", image: second, before: func(m *machine) { m.setVariables(noKeys) },
			want: locked, cause: seal.CauseBootState, moved: []int{4, 7, 9, 11}, says: []string{"PCR 7"}},
		{what: "the first image, after all of the above", image: first, before: func(m *machine) { m.setVariables(ownKeys) }, want: opens},
	})
}

func publicKey(t *testing.T, key *rsa.PrivateKey) []byte {
	der := must[[]byte](t)(x509.MarshalPKIXPublicKey(&key.PublicKey))
	return pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})
}

// withSignature returns the image with the key's signature of PCR 11.
func withSignature(t *testing.T, key *rsa.PrivateKey, i image) image {
	i.sections = map[string][]byte{".pcrpkey": publicKey(t, key)}
	pcr := pcr11(t, i)
	i.sections[".pcrsig"] = signPCR11(t, key, pcr)
	return i
}

// pcr11 computes the measurements of systemd's stub (252), in its order.
func pcr11(t *testing.T, i image) []byte {
	read := func(path string, err error) []byte { return must[[]byte](t)(os.ReadFile(must[string](t)(path, err))) }
	pcr := make([]byte, sha256.Size)
	extend := func(b []byte) {
		digest := sha256.Sum256(b)
		sum := sha256.Sum256(append(pcr, digest[:]...))
		pcr = sum[:]
	}
	for _, s := range []struct {
		name    string
		content []byte
	}{
		{".linux", read(shared.kernelFile(i))}, {".osrel", []byte(osRelease)}, {".cmdline", []byte(i.line())},
		{".initrd", read(shared.initrdFile(i))}, {".pcrpkey", i.sections[".pcrpkey"]},
	} {
		extend([]byte(s.name + "\x00"))
		extend(s.content)
	}
	return pcr
}

// signPCR11 writes systemd's file: the signature is over the digest of
// TPM2_PolicyPCR for this value of PCR 11 (TPM 2.0 part 3, 23.7).
func signPCR11(t *testing.T, key *rsa.PrivateKey, pcr []byte) []byte {
	const policyPCR = 0x17F
	values := sha256.Sum256(pcr)
	var b bytes.Buffer
	b.Write(make([]byte, sha256.Size)) // the policy digest of a new session
	b.Write(binary.BigEndian.AppendUint32(nil, policyPCR))
	b.Write([]byte{0, 0, 0, 1, 0x00, 0x0B, 3, 0, 1 << (11 - 8), 0}) // one selection: SHA-256, 3 bytes, PCR 11
	b.Write(values[:])
	policy := sha256.Sum256(b.Bytes())
	hash := sha256.Sum256(policy[:])
	signature := must[[]byte](t)(rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, hash[:]))
	fingerprint := sha256.Sum256(x509.MarshalPKCS1PublicKey(&key.PublicKey))
	return must[[]byte](t)(json.Marshal(map[string]any{"sha256": []any{map[string]any{
		"pcrs": []int{11}, "pkfp": hex.EncodeToString(fingerprint[:]), "pol": hex.EncodeToString(policy[:]), "sig": signature}}}))
}
