package leaks

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/recovery"
)

// needle is one form of a secret.
type needle struct {
	name string
	form []byte
}

// secrets are the forms of all secrets that must not be found.
type secrets []needle

// add looks for b in every form.
func (s *secrets) add(name string, b []byte) {
	put := func(form string, b []byte) { *s = append(*s, needle{name + ", " + form, bytes.Clone(b)}) }
	put("raw", b)
	put("hexadecimal", []byte(hex.EncodeToString(b)))
	put("hexadecimal", []byte(strings.ToUpper(hex.EncodeToString(b))))
	// As Go prints bytes: %q, %d, %#v
	put("quoted", []byte(strings.Trim(strconv.Quote(string(b)), `"`)))
	put("quoted twice", []byte(strings.ReplaceAll(strings.Trim(strconv.Quote(string(b)), `"`), `\`, `\\`)))
	put("decimal", []byte(strings.Trim(fmt.Sprint(b), "[]")))
	put("in Go's syntax", []byte(strings.TrimSuffix(strings.TrimPrefix(fmt.Sprintf("%#v", b), "[]byte{"), "}")))
	for _, encoding := range []*base64.Encoding{base64.RawStdEncoding, base64.RawURLEncoding} {
		for shift := range 3 {
			// Inside other bytes the secret starts at any of three positions of a
			// group. The characters that it shares with its neighbours don't count.
			padded := encoding.EncodeToString(append(make([]byte, shift), b...))
			put("base64", []byte(padded[[]int{0, 2, 3}[shift]:len(padded)-1]))
		}
	}
	*s = slices.CompactFunc(*s, func(a, b needle) bool { return a.name == b.name && bytes.Equal(a.form, b.form) })
}

// addIdentity looks for an age identity's text and for the scalar in it.
func (s *secrets) addIdentity(text string) {
	const prefix = len("AGE-SECRET-KEY-1")
	s.add("identity", []byte(text))
	s.add("identity's characters", []byte(text[prefix:]))
	s.add("identity in lower case", []byte(strings.ToLower(text[prefix:])))
	s.add("identity's scalar", scalar(text[prefix:]))
}

// scalar decodes Bech32 (BIP 173): 5 bits per character; the last 6 characters are a
// checksum.
func scalar(text string) (b []byte) {
	acc, bits := uint32(0), 0
	for _, c := range text[:len(text)-6] {
		acc, bits = acc<<5|uint32(strings.IndexRune("QPZRY9X8GF2TVDW0S3JN54KHCE6MUA7L", c)), bits+5
		if bits >= 8 {
			bits -= 8
			b = append(b, byte(acc>>bits))
		}
	}
	return b
}

// in returns the names of the secrets in b.
func (s secrets) in(b []byte) (found []string) {
	for _, n := range s {
		if at := bytes.Index(b, n.form); at >= 0 && !slices.Contains(found, n.name) {
			found = append(found, n.name)
		}
	}
	return found
}

// addKEK looks for the current KEK of a stored keyring. It obtains the KEK with the
// recovery identity.
func (s *secrets) addKEK(t *testing.T, name, file, identity string) {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	u, err := keyring.Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	var mem seal.Memory
	text, err := mem.Take([]byte(identity))
	if err != nil {
		t.Fatal(err)
	}
	defer text.Close()
	opener, err := recovery.NewOpener(mem, text)
	if err != nil {
		t.Fatal(err)
	}
	slots := u.Slots()
	i := slices.IndexFunc(slots, func(slot seal.Slot) bool { return slot.Type == seal.TypeRecovery })
	if i < 0 {
		t.Fatal("the keyring has no recovery slot")
	}
	kek, err := opener.Unwrap(t.Context(), slots[i])
	if err != nil {
		t.Fatal(err)
	}
	defer kek.Close()
	if id := keyring.NewKeyID(u.ClusterID(), kek); id != u.CurrentID() {
		t.Fatalf("the recovery slot holds the KEK of key ID %s, the keyring's is %s", id, u.CurrentID())
	}
	kek.With(func(b []byte) { s.add("KEK "+name, b) })
}

// memory returns the secrets in the memory of the process, each with its mapping. It
// reads everything that root can read, as gcore and a debugger would.
func (s secrets) memory(t *testing.T, pid int) (found []string) {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	mem, err := os.Open(fmt.Sprintf("/proc/%d/mem", pid))
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	total := 0
	for line := range strings.Lines(string(maps)) {
		var from, to uint64
		var perm string
		if _, err := fmt.Sscanf(line, "%x-%x %s", &from, &to, &perm); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		if perm[:2] != "rw" {
			continue
		}
		b := make([]byte, to-from)
		n, _ := mem.ReadAt(b, int64(from)) // memfd_secret can't be read
		total += n
		for _, n := range s {
			if at := bytes.Index(b, n.form); at >= 0 {
				found = append(found, fmt.Sprintf("%s at %#x in %s: %s", n.name, from+uint64(at), strings.Join(strings.Fields(line), " "), around(b, at, len(n.form))))
			}
		}
	}
	if total == 0 {
		t.Fatal("nothing of the process's memory could be read")
	}
	return found
}

// around shows the bytes around a find, which show where it comes from.
func around(b []byte, at, n int) string {
	return fmt.Sprintf("%.80q [%d bytes] %.80q", b[max(0, at-80):at], n, b[at+n:min(len(b), at+n+80)])
}
