package recovery

import (
	"bytes"
	"crypto/rand"
	"unsafe"

	"filippo.io/age"
	"github.com/beezy-dev/kleidi/seal"
)

// Identities, as age writes them.
const (
	prefixX25519      = "AGE-SECRET-KEY-1"
	prefixPostQuantum = "AGE-SECRET-KEY-PQ-1"
)

// errIdentity quotes nothing of the identity, and neither does it wrap age's
// error, which would.
var errIdentity = seal.Errorf(seal.CauseCredentials,
	"check it against the copy that you kept; it begins with "+prefixX25519+" or "+prefixPostQuantum,
	"the recovery identity does not parse")

// GenerateIdentity makes an X25519 identity and returns its text, 74
// characters, which is to be shown once and closed, and its recipient.
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
		rand.Read(k) // never fails, see crypto/rand
		identity.With(func(text []byte) { encodeIdentity(text, k) })
	})
	recipient, err = Recipient(identity)
	if err != nil {
		identity.Close()
		return nil, "", err
	}
	return identity, recipient, nil
}

// Recipient returns the public key of identity, the text of an age identity or
// of a file that holds one. Its error is of cause seal.CauseCredentials.
func Recipient(identity *seal.Secret) (recipient string, err error) {
	err = withIdentity(identity, func(_ age.Identity, public string) error {
		recipient = public
		return nil
	})
	return recipient, err
}

// withIdentity calls f with the parsed identity and its recipient. What age
// makes of the identity stays on the heap until it is overwritten: age has no
// way to erase it. That is the scalar, not the text.
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
		// age wants a string; a conversion would leave a copy. age doesn't keep it.
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

// identityLine finds the one line of an identity file that is no comment.
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
