package recovery

import (
	"bytes"
	"crypto/rand"
	"unsafe"

	"filippo.io/age"

	"github.com/beezy-dev/kleidi/seal"
)

// Prefixes of age identities.
const (
	prefixPostQuantum = "AGE-SECRET-KEY-PQ-1"
)

// errIdentity does not quote the identity. It does not wrap the error of age, which
// quotes it.
var errIdentity = seal.Errorf(seal.CauseCredentials,
	"check it against the copy that you kept; it begins with "+prefixX25519+" or "+prefixPostQuantum,
	"the recovery identity does not parse")

// GenerateIdentity returns the text of a new X25519 identity, 74 characters, and its
// recipient. The caller shows the identity once and closes it.
func GenerateIdentity(mem seal.Memory) (identity *seal.Secret, recipient string, err error) {
	key, err := mem.New(32)
	if err != nil {
		return nil, "", err
	}
	defer key.Close()
	identity, err = mem.New(len(prefixX25519) + 52 + 6)
	if err != nil {
		return nil, "", err
	}
	key.With(func(k []byte) {
		rand.Read(k) // crypto/rand.Read never fails
		identity.With(func(text []byte) { encodeIdentity(text, k) })
	})
	recipient, err = Recipient(identity)
	if err != nil {
		identity.Close()
		return nil, "", err
	}
	return identity, recipient, nil
}

// Recipient returns the public key of identity: the text of an age identity, or of a
// file that holds one. An error has the cause seal.CauseCredentials.
func Recipient(identity *seal.Secret) (recipient string, err error) {
	err = withIdentity(identity, func(_ age.Identity, public string) error {
		recipient = public
		return nil
	})
	return recipient, err
}

// withIdentity calls f with the parsed identity and its recipient. The scalar, which
// age parses from the text, stays on the heap until it is overwritten: age can't
// erase it.
func withIdentity(identity *seal.Secret, f func(id age.Identity, recipient string) error) (err error) {
	err = errIdentity
	if identity == nil {
		return err
	}
	identity.With(func(b []byte) {
		line, ok := identityLine(b)
		if !ok {
			return
		}
		// age parses a string and does not keep it. A conversion would leave a copy of
		// the text behind.
		text := unsafe.String(&line[0], len(line))
		if bytes.HasPrefix(line, []byte(prefixPostQuantum)) {
			if id, parseErr := age.ParseHybridIdentity(text); parseErr == nil {
				err = f(id, id.Recipient().String())
			}
			return
		}
		if id, parseErr := age.ParseX25519Identity(text); parseErr == nil {
			err = f(id, id.Recipient().String())
		}
	})
	return err
}

// identityLine returns the line of an identity file that is neither empty nor a
// comment. There must be exactly one.
func identityLine(b []byte) (line []byte, ok bool) {
	for l := range bytes.Lines(b) {
		l = bytes.TrimSpace(l)
		if len(l) == 0 || l[0] == '#' {
			continue
		}
		if line != nil {
			return nil, false
		}
		line = l
	}
	return line, line != nil
}
