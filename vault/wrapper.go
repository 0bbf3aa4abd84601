package vault

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/http"
	"sync"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/vault/internal/client"
	"github.com/beezy-dev/kleidi/vault/internal/transitslot"
)

// Wrapper wraps KEKs with a Transit key. It implements [seal.Wrapper].
type Wrapper struct {
	config Config

	// unwrapping holds an element while a goroutine unwraps a secret ID. It is a channel
	// because the others give up waiting when their contexts end.
	unwrapping chan struct{}

	mu       sync.Mutex // not held during a request
	secretID *unwrapped // nil until a wrapped secret ID is unwrapped
	closed   bool
}

// New returns a Wrapper. It does not ask the server. The error names every setting that is
// wrong.
func New(config Config) (*Wrapper, error) {
	config, err := config.complete()
	if err != nil {
		return nil, err
	}
	return &Wrapper{config: config, unwrapping: make(chan struct{}, 1)}, nil
}

// Close drops the unwrapped secret ID, if there is one.
func (w *Wrapper) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	w.dropSecretID()
	return nil
}

// Unwrapped reports whether w holds an unwrapped secret ID. Its wrapping token is then used
// up, and after Close the secret ID is lost.
func (w *Wrapper) Unwrapped() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.secretID != nil
}

// Type returns seal.TypeVault.
func (w *Wrapper) Type() string { return seal.TypeVault }

func (w *Wrapper) path(operation string) string {
	return w.config.Mount + "/" + operation + "/" + w.config.Key
}

// Wrap encrypts kek under the newest version of the Transit key.
func (w *Wrapper) Wrap(ctx context.Context, kek *seal.Secret) (slot seal.Slot, err error) {
	body := make([]byte, 0, 64+base64.StdEncoding.EncodedLen(seal.KEKSize))
	defer func() { clear(body[:cap(body)]) }()
	kek.With(func(b []byte) {
		if len(b) != seal.KEKSize {
			return
		}
		body = append(body, `{"plaintext":"`...)
		body = base64.StdEncoding.AppendEncode(body, b)
		body = append(body, `"}`...)
	})
	if len(body) == 0 {
		return slot, errors.New("vault: no KEK to wrap: it is closed or has the wrong size")
	}
	defer seal.Collect() // the copies of the KEK that crypto/tls leaves, see vault/internal/client
	err = w.withSession(ctx, func(ctx context.Context, s *session) error {
		s.Withhold(body[len(`{"plaintext":"`) : len(body)-len(`"}`)])
		slot, err = s.transit(ctx, client.Request{Path: w.path("encrypt"), Body: body, Capability: "update"})
		return err
	})
	return slot, err
}

// WrapLike wraps kek as Wrap does. The error is seal.ErrNotMine unless like is a slot of
// this wrapper's key.
func (w *Wrapper) WrapLike(ctx context.Context, kek *seal.Secret, like seal.Slot) (seal.Slot, error) {
	if _, err := w.config.ciphertext(like); err != nil {
		return seal.Slot{}, err
	}
	return w.Wrap(ctx, kek)
}

// Rewrap returns the slot with its KEK under the newest version of the Transit key. The
// server rewraps it, so the KEK does not leave the server.
func (w *Wrapper) Rewrap(ctx context.Context, slot seal.Slot) (rewrapped seal.Slot, err error) {
	ciphertext, err := w.config.ciphertext(slot)
	if err != nil {
		return seal.Slot{}, err
	}
	err = w.withSession(ctx, func(ctx context.Context, s *session) error {
		rewrapped, err = s.transit(ctx, client.Request{Path: w.path("rewrap"), Body: object(field{"ciphertext", []byte(ciphertext), false}), Capability: "update"})
		return err
	})
	return rewrapped, err
}

// transit sends a request whose answer is a ciphertext, and returns its slot.
func (s *session) transit(ctx context.Context, r client.Request) (seal.Slot, error) {
	answer, err := s.Call(ctx, r)
	if err != nil {
		return seal.Slot{}, s.explainCiphertext(ctx, r, err)
	}
	var parsed struct {
		Data struct {
			Ciphertext string `json:"ciphertext"`
		} `json:"data"`
	}
	if err := json.Unmarshal(answer, &parsed); err != nil {
		return seal.Slot{}, s.config.errorf(seal.CauseUnavailable, hintNotVault, "%s: %w: malformed JSON", r.Path, ErrNotVault)
	}
	return s.config.slot(parsed.Data.Ciphertext)
}

// Unwrap implements [seal.Wrapper].
func (w *Wrapper) Unwrap(ctx context.Context, slot seal.Slot) (kek *seal.Secret, err error) {
	ciphertext, err := w.config.ciphertext(slot)
	if err != nil {
		return nil, err
	}
	err = w.withSession(ctx, func(ctx context.Context, s *session) error {
		kek, err = s.decrypt(ctx, client.Request{Path: w.path("decrypt"), Body: object(field{"ciphertext", []byte(ciphertext), false}), Capability: "update"})
		return err
	})
	return kek, err
}

func (s *session) decrypt(ctx context.Context, r client.Request) (kek *seal.Secret, err error) {
	answer, err := s.Call(ctx, r)
	if err != nil {
		return nil, s.explainCiphertext(ctx, r, err)
	}
	defer clear(answer)
	var parsed struct {
		Data struct {
			Plaintext []byte `json:"plaintext"`
		} `json:"data"`
	}
	seal.Erase(func() { err = json.Unmarshal(answer, &parsed) })
	plain := parsed.Data.Plaintext
	defer func() { clear(plain[:cap(plain)]) }()
	if err != nil {
		return nil, s.config.errorf(seal.CauseUnavailable, hintNotVault, "%s: %w: malformed JSON", r.Path, ErrNotVault)
	}
	if len(plain) != seal.KEKSize {
		return nil, transitslot.Corrupt(errors.New("it holds no KEK"))
	}
	return s.config.Memory.Take(plain)
}

// explainCiphertext turns an error of call into a [*seal.Error], for a request with the
// ciphertext of a slot. The server may refuse that ciphertext.
func (s *session) explainCiphertext(ctx context.Context, r client.Request, err error) error {
	refused, ok := errors.AsType[*client.Refusal](err)
	if !ok || refused.Status != http.StatusBadRequest || refused.HasLine(textKeyMissing) || r.Path == s.config.Mount+"/encrypt/"+s.config.Key {
		return s.explain(ctx, r, err)
	}
	if refused.HasLine(textTooOld) {
		return s.config.errorf(seal.CauseUnavailable, "lower min_decryption_version of the Transit key, then run kleidi slot rewrap NAME",
			"%s: %w", r.Path, ErrTooOld)
	}
	return seal.Errorf(seal.CauseSlotCorrupt, hintOtherKey, "vault slot: the server can't decrypt it: %s", s.Quote(refused))
}
