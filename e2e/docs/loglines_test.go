package docs

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// TestLogLinesAreReal compares the messages in the documents with those in the code,
// each with its level, in both directions.
func TestLogLinesAreReal(t *testing.T) {
	logged := map[string]bool{}
	for _, folder := range []string{"cmd", "grpcserver", "internal", "seal", "tpm"} {
		err := filepath.WalkDir(top+folder, func(path string, _ fs.DirEntry, err error) error {
			if err == nil && strings.HasSuffix(path, ".go") && !strings.HasSuffix(path, "_test.go") {
				collectLogLines(t, path, logged)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	_, section, _ := strings.Cut(read(t, operations), "\n## Log lines\n")
	documented := map[string]bool{}
	for _, level := range []string{"info", "warn", "error"} {
		for row := range set("(?m)^\\| (`[^|]+`) \\| "+level+" \\|", section) {
			for line := range set("`([^`]+)`", row) {
				documented[level+": "+line] = true
			}
		}
	}
	mustContain(t, "operations.md", documented, logged)
	mustContain(t, "the code", logged, documented)
}

// collectLogLines adds "level: message" of each call of a logger in a file.
func collectLogLines(t *testing.T, path string, logged map[string]bool) {
	t.Helper()
	files := token.NewFileSet()
	f, err := parser.ParseFile(files, path, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	ast.Inspect(f, func(n ast.Node) bool {
		call, ok := n.(*ast.CallExpr)
		if !ok {
			return true
		}
		f, ok := call.Fun.(*ast.SelectorExpr)
		if !ok {
			return true
		}
		// server.keep logs the failure of the part that it keeps running.
		if f.Sel.Name == "keep" && len(call.Args) == 3 {
			logged["error: "+literal(call.Args[1])+" failed"] = true
		}
		if level := strings.ToLower(f.Sel.Name); isLogger(f.X) && (level == "info" || level == "warn" || level == "error") {
			switch message := literal(call.Args[0]); {
			case message != "":
				logged[level+": "+message] = true
			case !isSum(call.Args[0], " failed"):
				t.Errorf("%s: the message is no literal, so it can't be compared", files.Position(call.Pos()))
			}
		}
		return true
	})
}

// isLogger decides by the name: log, s.log, u.cfg.Log.
func isLogger(x ast.Expr) bool {
	switch x := x.(type) {
	case *ast.Ident:
		return strings.EqualFold(x.Name, "log")
	case *ast.SelectorExpr:
		return strings.EqualFold(x.Sel.Name, "log")
	}
	return false
}

// literal returns the value of x if x is a string literal, or "".
func literal(x ast.Expr) string {
	l, ok := x.(*ast.BasicLit)
	if !ok || l.Kind != token.STRING {
		return ""
	}
	s, _ := strconv.Unquote(l.Value)
	return s
}

// isSum recognises `what + " failed"`.
func isSum(x ast.Expr, end string) bool {
	sum, ok := x.(*ast.BinaryExpr)
	return ok && sum.Op == token.ADD && literal(sum.Y) == end
}
