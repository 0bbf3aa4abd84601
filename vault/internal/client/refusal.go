package client

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/beezy-dev/kleidi/seal"
)

// Texts by which a sealed server of Vault and of OpenBao is recognised.
const (
	textSealed    = "Vault is sealed"
	textSealedBao = "OpenBao is sealed"
)

// Refusal is an answer of the server with an error status.
type Refusal struct {
	Status     int
	Texts      []string
	RetryAfter time.Duration
}

func (r *Refusal) Error() string { return fmt.Sprintf("status %d", r.Status) }

// Lines returns the single errors of a refusal. It splits the lists of go-multierror:
// "2 errors occurred:\n\t* permission denied\n\t* invalid token\n\n".
func (r *Refusal) Lines() (all []string) {
	for _, text := range r.Texts {
		if heading, list, ok := strings.Cut(text, " occurred:\n"); ok && strings.Contains(heading, "error") {
			text = list
		}
		for line := range strings.Lines(text) {
			if line = strings.TrimPrefix(strings.TrimSpace(line), "* "); line != "" {
				all = append(all, line)
			}
		}
	}
	return all
}

// HasLine reports whether text is one of the lines.
func (r *Refusal) HasLine(text string) bool { return slices.Contains(r.Lines(), text) }

// Sealed reports whether the server is sealed.
func (r *Refusal) Sealed() bool { return r.HasLine(textSealed) || r.HasLine(textSealedBao) }

// MaxQuoted is the maximum size of a quotation of an answer in bytes.
const MaxQuoted = 200

// repeats reports whether text holds secret, in plain, quoted, or in the encodings that
// servers and loggers use.
func repeats(text string, secret []byte) (found bool) {
	if len(secret) == 0 {
		return false
	}
	seal.Erase(func() { // the forms are copies
		b := []byte(text)
		found = bytes.Contains(unquoted(b), unquoted(secret)) ||
			bytes.Contains(bytes.ToLower(b), []byte(hex.EncodeToString(secret))) ||
			bytes.Contains(b, []byte(base64.RawStdEncoding.EncodeToString(secret))) ||
			bytes.Contains(b, []byte(base64.RawURLEncoding.EncodeToString(secret)))
	})
	return found
}

// unquoted removes the characters that quoting adds, however often b was quoted.
func unquoted(b []byte) []byte {
	return bytes.Map(func(r rune) rune {
		if r == '\\' || r == '"' {
			return -1
		}
		return r
	}, b)
}

// temporary reports whether a failure of the transport may be over at the next try. A
// refused connection is not temporary: a server takes longer to start than the retries.
func temporary(err error) bool {
	if e, ok := errors.AsType[*NotVault](err); ok {
		return e.Status >= http.StatusInternalServerError || e.Status == http.StatusTooManyRequests
	}
	return BrokeOff(err)
}

// BrokeOff reports whether the other end, or something in between, ended the connection.
func BrokeOff(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
}
