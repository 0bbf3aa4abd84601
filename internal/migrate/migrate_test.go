package migrate

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/beezy-dev/kleidi/seal/store/kube"
)

// server is an API that refuses what a real one refuses only by an admission policy.
type server struct {
	objects int
	refuse  func(name string) int // the code, or 0
	list    func(w http.ResponseWriter, r *http.Request) (handled bool)

	mu      sync.Mutex
	patched []string
	accept  []string
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	answer := func(v any) { _ = json.NewEncoder(w).Encode(v) }
	name := filepath.Base(r.URL.Path)
	switch {
	case r.URL.Path == "/apis":
		answer(map[string]any{"groups": []any{}})
	case r.URL.Path == "/api/v1":
		var all []any
		for _, kind := range []string{"configmaps", "secrets"} {
			all = append(all, map[string]any{"name": kind, "namespaced": true, "verbs": []string{"list", "patch"}})
		}
		answer(map[string]any{"resources": all})
	case r.Method == http.MethodGet && s.list != nil && s.list(w, r):
	case r.Method == http.MethodGet:
		var all []any
		for i := range s.objects {
			all = append(all, map[string]any{"metadata": map[string]string{"name": fmt.Sprintf("%s-%d", name, i), "namespace": "default"}})
		}
		answer(map[string]any{"items": all})
	default:
		s.mu.Lock()
		defer s.mu.Unlock()
		if code := s.refuse(name); code != 0 {
			w.WriteHeader(code)
			answer(map[string]any{"kind": "Status", "apiVersion": "v1", "reason": "Invalid", "message": "policy: no"})
			return
		}
		s.patched, s.accept = append(s.patched, name), append(s.accept, r.Header.Get("Accept"))
	}
}

func (s *server) run(t *testing.T) (*Result, error) {
	t.Helper()
	return Run(context.Background(), client(t, s), Options{Resources: []string{"secrets", "configmaps"}, By: ByPatch, Workers: 4, Rate: 1e6})
}

// client returns a client of the given API.
func client(t *testing.T, api http.Handler) *kube.Client {
	t.Helper()
	web := httptest.NewTLSServer(api)
	t.Cleanup(web.Close)
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: web.Certificate().Raw})
	dir := t.TempDir()
	kubeconfig := filepath.Join(dir, "kubeconfig")
	for file, b := range map[string]string{filepath.Join(dir, "ca.crt"): string(ca), kubeconfig: fmt.Sprintf(
		"{apiVersion: v1, kind: Config, current-context: c, clusters: [{name: c, cluster: {server: %q, certificate-authority: ca.crt}}], contexts: [{name: c, context: {cluster: c}}]}", web.URL)} {
		if err := os.WriteFile(file, []byte(b), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c, err := kube.NewClient(kube.Options{Kubeconfig: kubeconfig})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestRefusedObjects: an object that the API refuses holds up no other object, of its
// own resource or of the next. The error names it. Values are never asked for.
func TestRefusedObjects(t *testing.T) {
	s := &server{objects: 50, refuse: func(name string) int {
		if name == "configmaps-3" {
			return http.StatusUnprocessableEntity
		}
		return 0
	}}
	r, err := s.run(t)
	if err == nil || !strings.Contains(err.Error(), "migrate configmaps: 1 object refused by the API; the first is /api/v1/namespaces/default/configmaps/configmaps-3: the API answers 422: policy: no; correct these objects") {
		t.Errorf("error %v", err)
	}
	if r == nil || len(r.Resources) != 2 || r.Resources[0].Objects != 49 || r.Resources[0].Refused != 1 || r.Resources[1].Objects != 50 || len(s.patched) != 99 {
		t.Errorf("%+v, %d patched", r, len(s.patched))
	}
	if slices.ContainsFunc(s.accept, func(accept string) bool { return !strings.Contains(accept, "as=PartialObjectMetadata;") }) {
		t.Errorf("whole objects were asked for: %s", s.accept[0])
	}
}

// TestAllRefused: if nothing is written, a migration ends soon.
func TestAllRefused(t *testing.T) {
	var calls atomic.Int64
	s := &server{objects: 400, refuse: func(string) int { calls.Add(1); return http.StatusForbidden }}
	if r, err := s.run(t); err == nil || !strings.Contains(err.Error(), "--dry-run shows the ClusterRole") || calls.Load() > 2*allRefused || len(r.Resources) != 1 {
		t.Errorf("%d calls, %v", calls.Load(), err)
	}
}

// TestFewRefused: a resource whose few objects are all refused holds up no other
// resource, and the hint speaks of the user's rights.
func TestFewRefused(t *testing.T) {
	s := &server{objects: 2, refuse: func(name string) int {
		if strings.HasPrefix(name, "configmaps") {
			return http.StatusForbidden
		}
		return 0
	}}
	if r, err := s.run(t); err == nil || !strings.Contains(err.Error(), "2 objects refused") || !strings.Contains(err.Error(), "--dry-run shows the ClusterRole") || len(r.Resources) != 2 || r.Resources[1].Objects != 2 {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestPages: an object that is gone is passed over, a list whose revision is compacted goes
// on at a newer one, and a page that is too large is asked for in smaller ones.
func TestPages(t *testing.T) {
	s := &server{objects: 3, refuse: func(name string) int {
		if name == "configmaps-1" {
			return http.StatusNotFound
		}
		return 0
	}}
	compacted, limits := false, []string{}
	s.list = func(w http.ResponseWriter, r *http.Request) bool {
		limits = append(limits, r.URL.Query().Get("limit"))
		switch {
		case r.URL.Query().Get("limit") == "500":
			_, _ = w.Write(make([]byte, 4<<20))
		case !compacted:
			compacted = true
			w.WriteHeader(http.StatusGone)
			_ = json.NewEncoder(w).Encode(map[string]any{"kind": "Status", "message": "compacted", "metadata": map[string]string{"continue": "newer"}})
		case r.URL.Query().Get("continue") != "newer" && strings.HasSuffix(r.URL.Path, "configmaps"):
			t.Errorf("the list does not go on: %s", r.URL)
			return false
		default:
			return false
		}
		return true
	}
	r, err := s.run(t)
	if err != nil || len(r.Resources) != 2 || r.Resources[0].Objects != 2 || r.Resources[0].Gone != 1 || r.Resources[1].Objects != 3 {
		t.Errorf("%+v, %v", r, err)
	}
	if want := []string{"500", "125", "125", "500", "125"}; !slices.Equal(limits, want) {
		t.Errorf("pages of %v, want %v", limits, want)
	}
}

// TestConflicts: an object that somebody else writes at the same time is patched again, and
// counted once.
func TestConflicts(t *testing.T) {
	tries := map[string]int{} // under the server's lock
	s := &server{objects: 3, refuse: func(name string) int {
		if tries[name]++; name == "secrets-1" && tries[name] < 3 {
			return http.StatusConflict
		}
		return 0
	}}
	r, err := s.run(t)
	if err != nil || len(r.Resources) != 2 || r.Resources[1].Objects != 3 || r.Resources[1].Conflicts != 2 || r.Resources[1].Refused != 0 || r.Resources[0].Conflicts != 0 {
		t.Errorf("%+v, %v", r, err)
	}
	if len(s.patched) != 6 || tries["secrets-1"] != 3 {
		t.Errorf("%d patched, %d tries", len(s.patched), tries["secrets-1"])
	}
}
