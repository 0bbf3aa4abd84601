// Package recovery wraps KEKs to age recipients (age-encryption.org). The operator
// keeps their identities away from the machine. Wrapping takes the recipients, which
// are public. Unwrapping takes one of the identities.
//
// A slot holds an ordinary age file of 32 bytes, so the age command opens it too.
package recovery

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"slices"
	"strings"

	"filippo.io/age"
	"github.com/beezy-dev/kleidi/seal"
	kjson "sigs.k8s.io/json"
)

// Limits.
const (
	// MaxRecipients is the maximum number of recipients of a slot. This many post-quantum
	// recipients fit into seal.MaxSlotData.
	MaxRecipients = 6
	// maxRecipient is the maximum size of a recipient in characters; a post-quantum
	// one has 1959.
	maxRecipient = 2048
)

const hintRestore = "run kleidi keyring restore --previous, or kleidi keyring restore BACKUP"

// Wrapper wraps KEKs to recipients. With an identity it also unwraps them.
type Wrapper struct {
	mem        seal.Memory
	names      []string
	recipients []age.Recipient
	identity   *seal.Secret
}

// slotData is Slot.Data of a recovery slot.
type slotData struct {
	// Recipients are the public keys, for display; unwrapping doesn't use them.
	Recipients []string `json:"recipients"`
	// Age is the age file.
	Age []byte `json:"age"`
}

// NewWrapper returns a Wrapper for 1 to MaxRecipients recipients. All of them are
// age1… keys or all of them are age1pq… keys: the two kinds don't mix. The Wrapper
// can't unwrap; see [Wrapper.WithIdentity].
func NewWrapper(mem seal.Memory, recipients []string) (*Wrapper, error) {
	if len(recipients) == 0 || len(recipients) > MaxRecipients {
		return nil, fmt.Errorf("%d recovery recipients; name 1 to %d", len(recipients), MaxRecipients)
	}
	w := &Wrapper{mem: mem, names: slices.Clone(recipients)}
	for i, name := range recipients {
		if slices.Contains(recipients[:i], name) {
			return nil, fmt.Errorf("recovery recipient %d is named twice; name it once", i+1)
		}
		if isPostQuantum(name) != isPostQuantum(recipients[0]) {
			return nil, errors.New("recovery recipients age1… and age1pq… don't mix; name only one kind")
		}
		r, err := parseRecipient(name)
		if err != nil {
			return nil, fmt.Errorf("recovery recipient %d: %w; name an age1… or age1pq… public key", i+1, err)
		}
		w.recipients = append(w.recipients, r)
	}
	return w, nil
}

func isPostQuantum(recipient string) bool { return strings.HasPrefix(recipient, "age1pq1") }

// parseRecipient parses a recipient. Its errors do not quote s, because the operator
// may have mistaken an identity for a recipient.
func parseRecipient(s string) (age.Recipient, error) {
	if len(s) > maxRecipient {
		return nil, fmt.Errorf("more than %d characters", maxRecipient)
	}
	if strings.HasPrefix(strings.ToUpper(s), "AGE-SECRET-KEY-") {
		return nil, errors.New("this is a secret identity, not a recipient")
	}
	var r age.Recipient
	var err error
	if isPostQuantum(s) {
		r, err = age.ParseHybridRecipient(s)
	} else {
		r, err = age.ParseX25519Recipient(s)
	}
	if err != nil {
		return nil, errors.New("malformed")
	}
	return r, nil
}

// WithIdentity returns a copy of w that also unwraps the slots wrapped to identity:
// the text of an age identity, or of a file that holds one. The caller owns identity
// and closes it after the last use of the Wrapper.
func (w *Wrapper) WithIdentity(identity *seal.Secret) (*Wrapper, error) {
	if _, err := Recipient(identity); err != nil {
		return nil, err
	}
	with := *w
	with.identity = identity
	return &with, nil
}

// NewOpener returns a Wrapper that unwraps the slots wrapped to identity, and wraps to
// identity's recipient alone.
func NewOpener(mem seal.Memory, identity *seal.Secret) (*Wrapper, error) {
	recipient, err := Recipient(identity)
	if err != nil {
		return nil, err
	}
	w, err := NewWrapper(mem, []string{recipient})
	if err != nil {
		return nil, err
	}
	return w.WithIdentity(identity)
}

// Recipients returns the recipients that a recovery slot names, so that the next KEK
// can be wrapped to them. They are untrusted, unless the slot is from an open keyring.
func Recipients(slot seal.Slot) ([]string, error) {
	if slot.Type != seal.TypeRecovery {
		return nil, seal.ErrNotMine
	}
	data, err := parseSlot(slot)
	if err != nil {
		return nil, err
	}
	return data.Recipients, nil
}

// Type returns seal.TypeRecovery.
func (w *Wrapper) Type() string { return seal.TypeRecovery }

// Wrap encrypts kek to all recipients. The identity of any one of them opens the slot.
func (w *Wrapper) Wrap(ctx context.Context, kek *seal.Secret) (seal.Slot, error) {
	if err := ctx.Err(); err != nil {
		return seal.Slot{}, unavailable(err)
	}
	var file []byte
	err := errors.New("no KEK to wrap: it is closed or has the wrong size")
	kek.With(func(b []byte) {
		if len(b) == seal.KEKSize {
			file, err = encrypt(b, w.recipients)
		}
	})
	if err != nil {
		return seal.Slot{}, fmt.Errorf("wrap for recovery: %w", err)
	}
	debug.FreeOSMemory() // as in Unwrap
	data, err := json.Marshal(slotData{Recipients: w.names, Age: file})
	if err != nil {
		return seal.Slot{}, fmt.Errorf("wrap for recovery: %w", err)
	}
	if len(data) > seal.MaxSlotData {
		return seal.Slot{}, fmt.Errorf("wrap for recovery: slot of %d bytes, at most %d; name fewer recipients", len(data), seal.MaxSlotData)
	}
	return seal.Slot{Type: seal.TypeRecovery, Data: data}, nil
}

// encrypt encrypts kek to the recipients, and decrypts the result with the file key that
// age gave each of them to wrap. Without an identity, nothing more can be proven.
func encrypt(kek []byte, recipients []age.Recipient) ([]byte, error) {
	witnessed := slices.Clone(recipients)
	first := &witness{Recipient: recipients[0]}
	defer func() { clear(first.fileKey) }()
	witnessed[0] = first
	var file bytes.Buffer
	w, err := age.Encrypt(&file, witnessed...)
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(kek); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil { // it encrypts in place, so no plaintext stays in the buffer
		return nil, err
	}
	r, err := age.Decrypt(bytes.NewReader(file.Bytes()), first)
	if err != nil {
		return nil, fmt.Errorf("read back: %w", err)
	}
	plain := make([]byte, len(kek)+1)
	defer clear(plain)
	if n, err := io.ReadFull(r, plain); !errors.Is(err, io.ErrUnexpectedEOF) || !bytes.Equal(plain[:n], kek) {
		return nil, errors.New("read back: the age file does not hold the KEK")
	}
	return file.Bytes(), nil
}

// witness is a recipient that keeps the file key of the file encrypted to it, and opens
// the file with that key.
type witness struct {
	age.Recipient
	fileKey []byte
}

// WrapWithLabels implements age.RecipientWithLabels. Post-quantum recipients have labels.
func (w *witness) WrapWithLabels(fileKey []byte) ([]*age.Stanza, []string, error) {
	w.fileKey = bytes.Clone(fileKey)
	if r, ok := w.Recipient.(age.RecipientWithLabels); ok {
		return r.WrapWithLabels(fileKey)
	}
	stanzas, err := w.Wrap(fileKey)
	return stanzas, nil, err
}

// Unwrap implements age.Identity.
func (w *witness) Unwrap([]*age.Stanza) ([]byte, error) { return bytes.Clone(w.fileKey), nil }

// Unwrap opens a slot with the identity. The error is seal.ErrNotMine if w has no
// identity, or if the slot is not wrapped to it. It has the cause
// seal.CauseSlotCorrupt if the slot doesn't parse or doesn't authenticate.
func (w *Wrapper) Unwrap(ctx context.Context, slot seal.Slot) (*seal.Secret, error) {
	if slot.Type != seal.TypeRecovery || w.identity == nil {
		return nil, seal.ErrNotMine
	}
	if err := ctx.Err(); err != nil {
		return nil, unavailable(err)
	}
	data, err := parseSlot(slot)
	if err != nil {
		return nil, err
	}
	var kek *seal.Secret
	err = withIdentity(w.identity, func(id age.Identity, _ string) error {
		kek, err = w.decrypt(data.Age, id)
		return err
	})
	if err != nil {
		return nil, err
	}
	// age decrypts into buffers of 64 KiB, which this package can't erase. Collecting
	// them returns them, with the KEK in them, to the kernel.
	debug.FreeOSMemory()
	return kek, nil
}

func (w *Wrapper) decrypt(file []byte, id age.Identity) (*seal.Secret, error) {
	r, err := age.Decrypt(bytes.NewReader(file), id)
	if _, other := errors.AsType[*age.NoIdentityMatchError](err); other {
		return nil, seal.ErrNotMine
	}
	if err != nil {
		return nil, corrupt(errAgeFile)
	}
	plain := make([]byte, seal.KEKSize+1)
	defer clear(plain)
	n, err := io.ReadFull(r, plain)
	if !errors.Is(err, io.ErrUnexpectedEOF) || n != seal.KEKSize {
		return nil, corrupt(errAgeFile)
	}
	return w.mem.Take(plain[:n])
}

func parseSlot(slot seal.Slot) (data slotData, err error) {
	if len(slot.Data) > seal.MaxSlotData {
		return data, corrupt(fmt.Errorf("%d bytes, at most %d", len(slot.Data), seal.MaxSlotData))
	}
	strict, err := kjson.UnmarshalStrict(slot.Data, &data)
	if err != nil || len(strict) > 0 || len(data.Recipients) > MaxRecipients {
		return slotData{}, corrupt(errors.New("it does not have the form that kleidi writes"))
	}
	return data, nil
}

// errAgeFile replaces the errors of age, some of which quote the file at length.
var errAgeFile = fmt.Errorf("the age file is damaged or holds no KEK of %d bytes", seal.KEKSize)

func corrupt(err error) error {
	return seal.Errorf(seal.CauseSlotCorrupt, hintRestore, "recovery slot: %w", err)
}

func unavailable(err error) error {
	return seal.Errorf(seal.CauseUnavailable, "run the command again", "recovery: %w", err)
}
