package clusterstore

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/e2e/node"
	"github.com/beezy-dev/kleidi/seal/replica/storetest"
	"github.com/beezy-dev/kleidi/seal/store"
	"github.com/beezy-dev/kleidi/seal/store/kube"
)

// TestStore runs the conformance tests on a real API.
func TestStore(t *testing.T) {
	a := startAPI(t)
	storetest.Test(t, func(t *testing.T) storetest.Harness { return a.empty(t) })
	t.Run("stale read before a swap", func(t *testing.T) {
		h := a.empty(t)
		a, b := []byte("a"), []byte("b")
		if err := errors.Join(h.Swap(t.Context(), nil, a), h.Swap(t.Context(), a, b)); err != nil {
			t.Fatal(err)
		}
		h.Stale() // so that only the patch itself can find the conflict
		if err := h.Swap(t.Context(), a, []byte("c")); !errors.Is(err, store.ErrConflict) {
			t.Errorf("swap after a stale read: %v", err)
		}
		if got, err := h.Load(t.Context()); err != nil || !bytes.Equal(got, b) {
			t.Errorf("%q, %v", got, err)
		}
	})
	t.Run("lost answer is read back", func(t *testing.T) {
		h := a.empty(t)
		h.LoseAnswer()
		if err := h.Swap(t.Context(), nil, []byte("a")); err != nil {
			t.Error(err)
		}
		h.LoseAnswer()
		if err := h.Swap(t.Context(), []byte("a"), []byte("b")); err != nil {
			t.Error(err)
		}
	})
}

// harness is a kube.Store whose transport loses, delays and repeats requests.
type harness struct {
	*kube.Store
	t   *testing.T
	api *api

	mu     sync.Mutex
	rt     http.RoundTripper
	fault  string
	late   *http.Request
	last   []byte // the answer to the last read of the Keyring
	before []byte // the answer to the one before the last swap
}

// empty returns a harness of an API without objects of ours.
func (a *api) empty(t *testing.T) *harness {
	t.Helper()
	h := &harness{t: t, api: a}
	h.Store = a.client(t, func(rt http.RoundTripper) http.RoundTripper {
		h.rt = rt
		return h
	})
	for _, path := range []string{"/apis/" + kube.APIVersion + "/keyrings", "/apis/" + kube.APIVersion + "/keyringnodes"} {
		node.Eventually(t, 2*time.Minute, "the API serves "+path, func() error {
			return h.Do(t.Context(), http.MethodDelete, path, "", nil, nil)
		})
	}
	return h
}

// isSwap reports whether a request changes the Keyring.
func isSwap(r *http.Request) bool {
	return strings.Contains(r.URL.Path, "/keyrings") && (r.Method == http.MethodPatch || r.Method == http.MethodPost)
}

func isRead(r *http.Request) bool {
	return strings.HasSuffix(r.URL.Path, "/keyrings/cluster") && r.Method == http.MethodGet
}

func (h *harness) take(fault string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.fault != fault {
		return false
	}
	h.fault = ""
	return true
}

// RoundTrip implements http.RoundTripper.
func (h *harness) RoundTrip(r *http.Request) (*http.Response, error) {
	switch {
	case isSwap(r) && h.take("delay"):
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return nil, err
		}
		later := r.Clone(h.t.Context())
		later.Body = io.NopCloser(bytes.NewReader(body))
		h.late = later
		return nil, storetest.ErrLost
	case isSwap(r) && h.take("lose"):
		res, err := h.rt.RoundTrip(r)
		if err != nil {
			return nil, err
		}
		res.Body.Close()
		return nil, storetest.ErrLost
	case isRead(r) && h.take("stale"):
		return &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: io.NopCloser(bytes.NewReader(h.before)), Request: r}, nil
	}
	res, err := h.rt.RoundTrip(r)
	if err != nil || res.StatusCode/100 != 2 {
		return res, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case isSwap(r):
		h.before = h.last
	case isRead(r):
		if h.last, err = io.ReadAll(res.Body); err != nil {
			return nil, err
		}
		res.Body = io.NopCloser(bytes.NewReader(h.last))
	}
	return res, nil
}

func (h *harness) set(fault string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.fault = fault
}

// LoseAnswer implements storetest.Harness.
func (h *harness) LoseAnswer() { h.set("lose") }

// Stale implements storetest.Harness.
func (h *harness) Stale() { h.set("stale") }

// Delay implements storetest.Harness.
func (h *harness) Delay() (arrive func()) {
	h.set("delay")
	return func() {
		res, err := h.rt.RoundTrip(h.late)
		if err != nil {
			h.t.Fatal(err)
		}
		res.Body.Close()
	}
}

// Snapshot implements storetest.Harness.
func (h *harness) Snapshot() (restore func()) { return h.api.snapshot(h.t) }
