package vault

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/seal"
)

// unwraps returns a before that answers for wrapping tokens, each of which can be unwrapped
// once. hold, if set, is called before the first one is unwrapped.
func unwraps(hold func()) func(w http.ResponseWriter, r *http.Request, n int) bool {
	return func(w http.ResponseWriter, r *http.Request, n int) bool {
		switch r.URL.Path {
		case "/v1/sys/wrapping/lookup":
			answer(w, http.StatusOK, `{"data":{"creation_path":"auth/approle/role/kleidi/secret-id"}}`)
		case "/v1/sys/wrapping/unwrap":
			if n > 1 {
				answer(w, http.StatusBadRequest, `{"errors":["wrapping token is not valid or does not exist"]}`)
				return true
			}
			if hold != nil {
				hold()
			}
			answer(w, http.StatusOK, `{"data":{"secret_id":"secret_from_the_wrapping"}}`)
		case "/v1/auth/approle/login":
			var body map[string]string
			b, _ := io.ReadAll(r.Body)
			if json.Unmarshal(b, &body) != nil || body["secret_id"] != "secret_from_the_wrapping" {
				answer(w, http.StatusBadRequest, `{"errors":["invalid secret id"]}`)
				return true
			}
			answer(w, http.StatusOK, `{"auth":{"client_token":"`+fakeToken+`"}}`)
		default:
			return false
		}
		return true
	}
}

func wrappedConfig(t *testing.T, f *fake) Config {
	t.Helper()
	c := f.config()
	c.Auth.SecretIDWrapped = true
	if err := os.WriteFile(c.Auth.SecretIDFile, []byte("hvs.wrapping-token\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return c
}

// TestUnwrappedOnce: a wrapping token serves all operations of one wrapper, and no operation
// of another.
func TestUnwrappedOnce(t *testing.T) {
	f := newFake(t, unwraps(nil))
	c := wrappedConfig(t, f)
	w := newWrapper(t, c)
	if w.Unwrapped() {
		t.Error("it holds a secret ID before it was asked for any")
	}
	for range 2 {
		if _, err := w.Wrap(t.Context(), newKEK(t)); err != nil {
			t.Fatal(err)
		}
	}
	if !w.Unwrapped() || len(f.sent("sys/wrapping/unwrap")) != 1 {
		t.Errorf("it was unwrapped %d times", len(f.sent("sys/wrapping/unwrap")))
	}
	_, err := newWrapper(t, c).Wrap(t.Context(), newKEK(t))
	checkError(t, err, seal.CauseCredentials, ErrLogin, "put a new wrapping token there", "each start of kleidi serve takes one")
	w.Close()
	if w.Unwrapped() {
		t.Error("it holds a secret ID after it was closed")
	}
}

// TestUnwrappingHoldsNobodyUp: while one goroutine waits for the server to unwrap a token,
// the others wait until their deadlines at most, and Close does not wait.
func TestUnwrappingHoldsNobodyUp(t *testing.T) {
	asked, goOn := make(chan struct{}), make(chan struct{})
	f := newFake(t, unwraps(func() { close(asked); <-goOn }))
	w := newWrapper(t, wrappedConfig(t, f))
	kek := newKEK(t)
	wrap := func(ctx context.Context) <-chan error {
		done := make(chan error, 1)
		go func() {
			_, err := w.Wrap(ctx, kek)
			done <- err
		}()
		return done
	}
	first := wrap(t.Context())
	<-asked
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	closed := make(chan struct{})
	select {
	case err := <-wrap(ctx):
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("the second one: %v", err)
		}
	case <-first:
		close(goOn)
		t.Fatal("the second one waits until the first one's time is up")
	}
	go func() { w.Close(); close(closed) }()
	select {
	case <-closed:
	case <-first:
		close(goOn)
		t.Fatal("Close waits until the first one's time is up")
	}
	close(goOn)
	if err := <-first; err != nil {
		t.Errorf("the first one: %v", err)
	}
	if w.Unwrapped() {
		t.Error("it keeps a secret ID although it is closed")
	}
}

// TestUnwrappedForTheNext: if a caller goes away while its token is unwrapped, the next
// caller gets the secret ID, because the server does not give it out again.
func TestUnwrappedForTheNext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	f := newFake(t, unwraps(cancel))
	w := newWrapper(t, wrappedConfig(t, f))
	kek := newKEK(t)
	if _, err := w.Wrap(ctx, kek); !errors.Is(err, context.Canceled) {
		t.Errorf("who has gone: %v", err)
	}
	if _, err := w.Wrap(t.Context(), kek); err != nil {
		t.Errorf("the next one: %v", err)
	}
}
