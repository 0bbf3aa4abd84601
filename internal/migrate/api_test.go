package migrate

import (
	"encoding/json"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// controller is an API with one StorageVersionMigration.
type controller struct {
	// conditions returns those that kube-controller-manager has set at the nth read.
	conditions func(n int64) []condition
	// refuse returns the code of the answer to the nth read, or 0. It may be nil.
	refuse  func(n int64) int
	busy    atomic.Int64 // how many removals are not answered
	reads   atomic.Int64
	removed atomic.Bool
}

func (c *controller) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m := migration{Metadata: migrationMetadata{Name: "kleidi-secrets-1"}}
	switch r.Method {
	case http.MethodGet:
		n := c.reads.Add(1)
		if c.refuse != nil && c.refuse(n) != 0 {
			w.WriteHeader(c.refuse(n))
			return
		}
		m.Status.Conditions = c.conditions(n)
	case http.MethodDelete:
		if c.busy.Add(-1) >= 0 {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		c.removed.Store(true)
	}
	_ = json.NewEncoder(w).Encode(m)
}

func (c *controller) request(t *testing.T, p patience, waiting func(string)) *request {
	t.Helper()
	p.poll = time.Millisecond
	return &request{client: client(t, c), resource: resource{name: "secrets"}, patience: p, waiting: waiting}
}

// TestSlowController: while kube-controller-manager has not begun, the operator learns
// why, once.
func TestSlowController(t *testing.T) {
	var told atomic.Pointer[string]
	var afterwards int
	c := &controller{conditions: func(int64) []condition {
		if told.Load() == nil {
			return nil
		}
		if afterwards++; afterwards < 5 {
			return nil
		}
		return []condition{{Type: "Succeeded", Status: "True"}}
	}}
	waiting := func(message string) {
		if told.Swap(&message) != nil {
			t.Error("told again")
		}
	}
	if err := c.request(t, patience{unnoticed: time.Hour}, waiting).run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if message := *told.Load(); !strings.HasPrefix(message, "secrets: waiting for kube-controller-manager, up to 1h0m0s: it begins only when ") {
		t.Errorf("told %q", message)
	}
	if !c.removed.Load() {
		t.Error("the migration is left behind")
	}
}

// TestNoController: without kube-controller-manager the wait ends, and the error names the
// way that needs none.
func TestNoController(t *testing.T) {
	c := &controller{conditions: func(int64) []condition { return nil }}
	err := c.request(t, patience{explain: time.Hour, unnoticed: time.Millisecond}, nil).run(t.Context())
	if err == nil || !strings.Contains(err.Error(), "kube-controller-manager has not begun with StorageVersionMigration kleidi-secrets-1 in 1ms; run kleidi migrate --by=patch") {
		t.Errorf("error %v", err)
	}
	if !c.removed.Load() {
		t.Error("the migration is left behind")
	}
}

// TestBusyAPI: an answer that only says that the API is busy does not end the wait. Another
// refusal does.
func TestBusyAPI(t *testing.T) {
	answers := map[int64]int{1: http.StatusTooManyRequests, 2: http.StatusServiceUnavailable}
	c := &controller{
		refuse:     func(n int64) int { return answers[n] },
		conditions: func(int64) []condition { return []condition{{Type: "Succeeded", Status: "True"}} },
	}
	c.busy.Store(1)
	if err := c.request(t, patience{unnoticed: time.Hour}, nil).run(t.Context()); err != nil || c.reads.Load() != 3 || !c.removed.Load() {
		t.Errorf("%d reads: %v", c.reads.Load(), err)
	}
	answers[4] = http.StatusForbidden
	if err := c.request(t, patience{unnoticed: time.Hour}, nil).run(t.Context()); err == nil || !strings.Contains(err.Error(), "403") {
		t.Error(err)
	}
}

// TestBegun: the time to begin does not bound a migration that is under way, and its
// operator is told nothing about a wait.
func TestBegun(t *testing.T) {
	c := &controller{conditions: func(n int64) []condition {
		if n < 10 {
			return []condition{{Type: "Running", Status: "True"}}
		}
		return []condition{{Type: "Failed", Status: "True", Message: "no"}}
	}}
	err := c.request(t, patience{}, func(message string) { t.Errorf("told %q", message) }).run(t.Context())
	if err == nil || !strings.Contains(err.Error(), "has failed: no; run kleidi migrate --by=patch") {
		t.Errorf("error %v", err)
	}
}
