package operation

import (
	"context"
	"go/ast"
	"go/parser"
	"go/token"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/internal/node/nodetest"
)

// TestTableIsWhole: serve answers each operation of this package exactly once.
func TestTableIsWhole(t *testing.T) {
	file, err := parser.ParseFile(token.NewFileSet(), "operation.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	defined, listed := map[string]bool{}, map[string]int{}
	ast.Inspect(file, func(x ast.Node) bool {
		spec, ok := x.(*ast.ValueSpec)
		if !ok || len(spec.Values) != 1 {
			return true
		}
		whole, ok := spec.Values[0].(*ast.CompositeLit)
		switch {
		case !ok:
		case spec.Names[0].Name == "table":
			for _, row := range whole.Elts {
				listed[row.(*ast.Ident).Name]++
			}
		default:
			defined[spec.Names[0].Name] = true
		}
		return true
	})
	if len(defined) == 0 || len(defined) != len(listed) {
		t.Errorf("%d operations are defined, the table lists %d", len(defined), len(listed))
	}
	for name := range defined {
		if listed[name] != 1 {
			t.Errorf("the table lists %s %d times", name, listed[name])
		}
	}
}

// TestServeWaits: serve begins an operation that shows the keyring only after the first
// attempt to unlock, or after a moment, and any other operation at once.
func TestServeWaits(t *testing.T) {
	n := nodetest.New(t, elsewhere(t))
	dir, err := os.MkdirTemp("", "kleidi") // the path of a socket must be short
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	l, err := admin.Listen(filepath.Join(dir, "admin.sock"), log)
	if err != nil {
		t.Fatal(err)
	}
	s := admin.NewServer(admin.Options{Log: log})
	go func() { _ = s.Serve(l) }()
	defer func() { _ = s.Shutdown(context.Background()) }()
	work := func(context.Context, *node.Node, admin.StatusRequest) (admin.StatusReport, error) {
		return admin.StatusReport{Node: "cp-1"}, nil
	}
	again := admin.Verb[admin.StatusRequest, admin.StatusReport]("again")
	Operation[admin.StatusRequest, admin.StatusReport]{Verb: admin.Status, work: work, keyring: seen}.handle(s, n)
	Operation[admin.StatusRequest, admin.StatusReport]{Verb: again, work: work}.handle(s, n)
	c, err := admin.Dial(t.Context(), filepath.Join(dir, "admin.sock"))
	if err != nil {
		t.Fatal(err)
	}
	call := func(v admin.Verb[admin.StatusRequest, admin.StatusReport]) {
		if r, err := admin.Call(t.Context(), c, v, admin.StatusRequest{}); err != nil || r.Node != "cp-1" {
			t.Errorf("%+v, %v", r, err)
		}
	}
	start := time.Now()
	call(admin.Status)
	if before := time.Since(start); before < firstAttempt {
		t.Errorf("without an attempt it waits %v", before)
	}
	if err := n.Unlocker.Unlock(t.Context()); err == nil {
		t.Fatal("there is a keyring")
	}
	if at := fastest(func() { call(again); call(admin.Status) }); at >= firstAttempt {
		t.Errorf("after the attempt, the two wait %v", at)
	}
}

// TestResealAny: the request decides which boot state the KEK is sealed to.
func TestResealAny(t *testing.T) {
	for says, req := range map[string]admin.ResealRequest{
		"reseal: PCR bank": {Next: &admin.BootState{Bank: "none"}, NewTPM: true},
		"reseal --new-tpm": {NewTPM: true},
		"reseal: ":         {},
	} {
		_, err := resealAny(t.Context(), nodetest.New(t, elsewhere(t)), req)
		if err == nil || !strings.HasPrefix(err.Error(), says) || says == "reseal: " && strings.Contains(err.Error(), "bank") {
			t.Errorf("%s: %v", says, err)
		}
	}
}
