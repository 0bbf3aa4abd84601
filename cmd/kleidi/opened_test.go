package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// opensFiles names the files of the source that open a file by another way than package
// internal/regular, and why.
var opensFiles = map[string]string{
	"grpcserver/internal/unixsocket/peer.go": "reads /proc",
	"internal/doctor/bundle/collect.go":      "reads /proc and /etc/os-release",
	"internal/files/files.go":                "opens a folder, to flush it",
	"internal/node/harden.go":                "reads /proc",
	"internal/ownership/openers.go":          "reads /etc/passwd and /etc/group",
	"internal/regular/regular.go":            "the one place",
	"seal/store/dir.go":                      "opens a folder, to flush it",
	"seal/store/kube/kubeconfig.go":          "reads a file that package regular has accepted",
	"internal/usage/etcd.go":                 "reads files that package regular has accepted",
	"tpm/simboot/internal/swtpm/swtpm.go":    "reads the log of its own child",
	"tpm/simboot/machine.go":                 "reads its own files",
	"tpm/attest/akfile.go":                   "follows no link, and refuses what is no file",
	"seal/store/file.go":                     "follows no link, and refuses what is no file",
}

// TestFilesAreOpenedInOnePlace: whatever a name leads to, no command waits for it. So every
// file is opened by package regular, or written.
func TestFilesAreOpenedInOnePlace(t *testing.T) {
	found := map[string]bool{}
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		name := filepath.ToSlash(strings.TrimPrefix(path, "../../"))
		switch {
		case err != nil:
			return err
		case d.IsDir() && (name == "e2e" || name == "testdata" || strings.HasPrefix(d.Name(), ".") && d.Name() != ".." ||
			slices.Contains([]string{"sealtest", "powerloss", "usagetest", "kubetest", "storetest", "cheap"}, d.Name())):
			return filepath.SkipDir
		case !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go"):
			return nil
		}
		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, path, nil, 0)
		if err != nil {
			return err
		}
		ast.Inspect(f, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok || !opens(call) {
				return true
			}
			if found[name] = true; opensFiles[name] == "" {
				t.Errorf("%s: a named pipe would block it; use package internal/regular", fset.Position(call.Pos()))
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for name := range opensFiles {
		if !found[name] {
			t.Errorf("%s opens no file any more", name)
		}
	}
}

// opens reports whether a call opens an existing file for reading.
func opens(call *ast.CallExpr) bool {
	fun, ok := call.Fun.(*ast.SelectorExpr)
	if !ok {
		return false
	}
	from, ok := fun.X.(*ast.Ident)
	if !ok {
		return false
	}
	switch from.Name + "." + fun.Sel.Name {
	case "os.Open", "os.ReadFile", "tls.LoadX509KeyPair":
		return true
	case "os.OpenFile":
		writes := false
		ast.Inspect(call.Args[1], func(n ast.Node) bool {
			s, ok := n.(*ast.SelectorExpr)
			writes = writes || ok && slices.Contains([]string{"O_CREATE", "O_RDWR", "O_WRONLY"}, s.Sel.Name)
			return true
		})
		return !writes
	}
	return false
}
