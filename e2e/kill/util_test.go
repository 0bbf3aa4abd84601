package kill

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// table is the table that the tests print at the end.
type table struct {
	mu   sync.Mutex
	rows []string
}

var series = []string{"create", "write", "flush", "link", "rename", "unlink", "TPM"}

// newTable returns a table that is printed when t's subtests have ended.
func newTable(t *testing.T) *table {
	k := &table{}
	t.Cleanup(func() {
		slices.Sort(k.rows)
		header := fmt.Sprintf("%-18s %-8s", "verb", "killed")
		for _, s := range series {
			header += fmt.Sprintf(" %6s", s)
		}
		t.Logf("kills before each step\n%s %6s\n%s", header, "all", strings.Join(k.rows, "\n"))
	})
	return k
}

func (k *table) add(verb, killed string, kills tally) {
	row := fmt.Sprintf("%-18s %-8s", verb, killed)
	for _, s := range series {
		row += fmt.Sprintf(" %6d", kills[s])
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.rows = append(k.rows, fmt.Sprintf("%s %6d", row, kills.total()))
}

// eventually repeats ready until it returns nil.
func eventually(t testing.TB, what string, ready func() error) {
	t.Helper()
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for err := ready(); err != nil; err = ready() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("%s: not within %s: %v", what, patience, err)
		}
	}
}
