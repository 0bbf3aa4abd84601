package bootstate_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/hex"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/bootstate"
)

// signers are made once: an RSA key takes a while.
var signers = sync.OnceValue(func() map[string]crypto.Signer {
	m := map[string]crypto.Signer{}
	var err error
	for name, curve := range map[string]elliptic.Curve{"P-256": elliptic.P256(), "P-384": elliptic.P384()} {
		if m[name], err = ecdsa.GenerateKey(curve, rand.Reader); err != nil {
			panic(err)
		}
	}
	if m["RSA"], err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
		panic(err)
	}
	return m
})

// values are PCR values that no machine has.
func values(bank crypto.Hash, pcrs ...int) authpolicy.PCR {
	p := authpolicy.PCR{Bank: bank, Values: map[int][]byte{}}
	for _, i := range pcrs {
		p.Values[i] = bytes.Repeat([]byte{byte(i + 1)}, bank.Size())
	}
	return p
}

func sign(t testing.TB, signer crypto.Signer, pcr authpolicy.PCR, ref []byte, what string) bootstate.State {
	t.Helper()
	s, err := bootstate.Sign(signer, pcr, ref, what)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func file(t testing.TB, states ...bootstate.State) *bootstate.File {
	t.Helper()
	f, err := bootstate.New(states...)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func marshal(t testing.TB, f *bootstate.File) []byte {
	t.Helper()
	b, err := f.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func parse(t testing.TB, b []byte) *bootstate.File {
	t.Helper()
	f, err := bootstate.Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func read(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func publicKey(t testing.TB, name string) crypto.PublicKey {
	t.Helper()
	pub, err := bootstate.ParsePublicKey(read(t, name))
	if err != nil {
		t.Fatal(err)
	}
	return pub
}

// measured reads what systemd-measure calculate printed: by bank, PCR 11 of each
// phase, in order.
func measured(t testing.TB, name string) map[crypto.Hash][]authpolicy.PCR {
	t.Helper()
	m := map[crypto.Hash][]authpolicy.PCR{}
	for line := range strings.Lines(string(read(t, name))) {
		head, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		index, bank, _ := strings.Cut(head, ":")
		i, err := strconv.Atoi(index)
		if err != nil {
			t.Fatal(err)
		}
		v, err := hex.DecodeString(value)
		if err != nil {
			t.Fatal(err)
		}
		h := map[string]crypto.Hash{"sha1": crypto.SHA1, "sha256": crypto.SHA256, "sha384": crypto.SHA384}[bank]
		m[h] = append(m[h], authpolicy.PCR{Bank: h, Values: map[int][]byte{i: v}})
	}
	return m
}
