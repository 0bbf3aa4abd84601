package kube_test

import (
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/store"
	"github.com/beezy-dev/kleidi/seal/store/kube"
	"github.com/beezy-dev/kleidi/seal/store/kube/kubetest"
)

// TestLacking: where the API refuses the node, the error names the right that is missing: for a
// swap, that of the request that was refused.
func TestLacking(t *testing.T) {
	api, err := kubetest.Start()
	if err != nil {
		t.Fatal(err)
	}
	defer api.Stop()
	path := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(path, api.Kubeconfig(), 0o600); err != nil {
		t.Fatal(err)
	}
	client, err := kube.NewClient(kube.Options{Kubeconfig: path})
	if err != nil {
		t.Fatal(err)
	}
	s := &kube.Store{Client: client}
	ctx := t.Context()
	for _, c := range []struct {
		denied, lacks string
		do            func() error
	}{
		{http.MethodPost, "create keyrings", func() error { return s.Swap(ctx, nil, []byte("a")) }},
		{"", "", func() error { return s.Swap(ctx, nil, []byte("a")) }},
		{http.MethodGet, "get keyrings", func() error { _, err := s.Load(ctx); return err }},
		{http.MethodGet, "get keyrings", func() error { return s.Swap(ctx, []byte("a"), []byte("b")) }},
		{http.MethodPatch, "patch keyrings", func() error { return s.Swap(ctx, []byte("a"), []byte("b")) }},
		{http.MethodPatch, "patch keyringnodes", func() error { return s.PutRecord(ctx, "cp-1", []byte("r")) }},
		{http.MethodPost, "there is no such object", func() error { return s.PutRecord(ctx, "cp-1", []byte("r")) }},
	} {
		api.Deny(c.denied)
		err := c.do()
		if c.lacks == "" {
			if err != nil {
				t.Fatal(err)
			}
			continue
		}
		if !kube.Refused(err, http.StatusForbidden) || seal.CauseOf(err) != seal.CauseCredentials || !strings.Contains(err.Error(), c.lacks) || !strings.Contains(err.Error(), "kleidi cluster setup") {
			t.Errorf("%s denied: %v", c.denied, err)
		}
	}
	api.Deny("")
	if b, err := s.Load(ctx); err != nil || string(b) != "a" {
		t.Errorf("the store holds %q, %v", b, err)
	}
}

// noReadBack is a transport that, once asked to, loses every read after a write has failed.
type noReadBack struct {
	http.RoundTripper
	armed, failed bool
}

var errNoReadBack = errors.New("the way to the API is gone")

// RoundTrip implements http.RoundTripper.
func (n *noReadBack) RoundTrip(r *http.Request) (*http.Response, error) {
	if n.failed && r.Method == http.MethodGet {
		return nil, errNoReadBack
	}
	res, err := n.RoundTripper.RoundTrip(r)
	n.failed = n.failed || n.armed && err != nil
	return res, err
}

// through returns a store whose requests to the API go through wrap.
func through(t *testing.T, api *kubetest.API, wrap func(http.RoundTripper) http.RoundTripper) *kube.Store {
	t.Helper()
	path := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(path, api.Kubeconfig(), 0o600); err != nil {
		t.Fatal(err)
	}
	client, err := kube.NewClient(kube.Options{Kubeconfig: path, Wrap: wrap})
	if err != nil {
		t.Fatal(err)
	}
	return &kube.Store{Client: client}
}

// TestLostAnswer: the API ends the connection without an answer, before or after it has
// stored a swap. The real client reads back what is stored: a swap that happened counts,
// one that did not is an error that is no conflict. If the read fails, too, the outcome is
// unknown, and the swap that happened is found at the next read.
func TestLostAnswer(t *testing.T) {
	api, err := kubetest.Start()
	if err != nil {
		t.Fatal(err)
	}
	defer api.Stop()
	way := &noReadBack{}
	s := through(t, api, func(rt http.RoundTripper) http.RoundTripper {
		way.RoundTripper = rt
		return way
	})
	ctx, last := t.Context(), ""
	for _, c := range []struct {
		what     string
		next     string
		when     kubetest.Moment // the API fails then
		no       bool            // what it stored can't be read back
		happened bool
	}{
		{"a creation is lost", "a", kubetest.Before, false, false},
		{"the answer to a creation is lost", "a", kubetest.After, false, true},
		{"a swap is lost", "b", kubetest.Before, false, false},
		{"the answer to a swap is lost", "b", kubetest.After, false, true},
		{"a swap is lost, and the API is away", "c", kubetest.Before, true, false},
		{"the answer to a swap is lost, and the API is away", "c", kubetest.After, true, true},
	} {
		fired := 0
		api.FailWrite(c.when, "keyrings", func() { fired++ })
		way.armed = c.no
		var old []byte
		if last != "" {
			old = []byte(last)
		}
		err := s.Swap(ctx, old, []byte(c.next))
		way.armed, way.failed = false, false
		if known := c.happened && !c.no; (err == nil) != known || errors.Is(err, store.ErrConflict) {
			t.Errorf("%s: %v", c.what, err)
		}
		if fired != 1 {
			t.Errorf("%s: the swap reached the API %d times", c.what, fired)
		}
		if c.happened {
			last = c.next
		}
		if b, err := s.Load(ctx); last != "" && (err != nil || string(b) != last) {
			t.Errorf("%s: the store holds %q, %v, want %q", c.what, b, err, last)
		}
	}
	if err := s.Swap(ctx, []byte("b"), []byte("d")); !errors.Is(err, store.ErrConflict) {
		t.Errorf("from the keyring before the swap of unknown outcome: %v", err)
	}
}

// answering is a transport that answers each write itself, as an admission
// policy does.
type answering struct {
	http.RoundTripper
	code   int
	touch  func() // at each write
	writes int
}

// RoundTrip implements http.RoundTripper.
func (a *answering) RoundTrip(r *http.Request) (*http.Response, error) {
	if a.code == 0 || r.Method == http.MethodGet {
		return a.RoundTripper.RoundTrip(r)
	}
	if a.writes++; a.touch != nil {
		a.touch()
	}
	return &http.Response{StatusCode: a.code, Request: r, Body: io.NopCloser(strings.NewReader(`{"kind":"Status","reason":"Invalid","message":"every object needs an owner label"}`))}, nil
}

// TestRefusedByPolicy: an admission policy may answer a swap as a failed test of a patch is
// answered. While the stored keyring stays the old one, that is no conflict. The swap ends,
// and its error quotes the policy.
func TestRefusedByPolicy(t *testing.T) {
	api, err := kubetest.Start()
	if err != nil {
		t.Fatal(err)
	}
	defer api.Stop()
	policy := &answering{}
	s := through(t, api, func(rt http.RoundTripper) http.RoundTripper {
		policy.RoundTripper = rt
		return policy
	})
	refused := func(what string, err error) {
		t.Helper()
		if err == nil || errors.Is(err, store.ErrConflict) || !strings.Contains(err.Error(), "every object needs an owner label") || seal.CauseOf(err) != seal.CauseConfiguration {
			t.Errorf("%s: %v", what, err)
		}
	}
	policy.code = http.StatusUnprocessableEntity
	refused("the first keyring", s.Swap(t.Context(), nil, []byte("a")))
	policy.code = 0
	if err := s.Swap(t.Context(), nil, []byte("a")); err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		code  int
		touch func()
		most  int
	}{
		"Invalid":                      {http.StatusUnprocessableEntity, nil, 1},
		"Conflict":                     {http.StatusConflict, nil, 1},
		"NotFound":                     {http.StatusNotFound, nil, 1},
		"and somebody writes as often": {http.StatusUnprocessableEntity, func() { api.Plant([]byte("a")) }, 8},
	} {
		policy.code, policy.touch, policy.writes = c.code, c.touch, 0
		refused(what, s.Swap(t.Context(), []byte("a"), []byte("b")))
		if policy.writes != c.most {
			t.Errorf("%s: %d attempts, want %d", what, policy.writes, c.most)
		}
	}
	policy.code = 0
	if err := s.Swap(t.Context(), []byte("a"), []byte("b")); err != nil {
		t.Errorf("without the policy: %v", err)
	}
}
