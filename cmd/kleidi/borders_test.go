package main

import (
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/beezy-dev/kleidi/"

// borders says which packages of ours each package may import. The test fails for a
// package that is not listed.
var borders = map[string][]string{
	"seal":                           {},
	"seal/keyring":                   {"seal"},
	"seal/store":                     {},
	"seal/store/kube":                {"seal/store"},
	"deploy/cluster":                 {},
	"seal/unlock":                    {"seal", "seal/keyring", "seal/store"},
	"seal/rotation":                  {"seal", "seal/keyring"},
	"seal/replica":                   {"seal", "seal/keyring", "seal/rotation", "seal/store", "seal/unlock"},
	"seal/replica/storetest":         {"seal/replica", "seal/store"},
	"seal/both":                      {"seal"},
	"seal/recovery":                  {"seal"},
	"seal/sealtest":                  {"seal"},
	"hsm/internal/cheap":             {},
	"tpm/device":                     {"seal"},
	"tpm/keys":                       {"internal/ownership", "seal", "tpm/authpolicy", "tpm/device"},
	"tpm":                            {"seal", "tpm/authpolicy", "tpm/device", "tpm/keys"},
	"tpm/credential":                 {"seal", "tpm/authpolicy", "tpm/device", "tpm/keys"},
	"tpm/internal/nodetest":          {"seal", "tpm", "tpm/attest", "tpm/keys", "tpm/nv", "tpm/simboot", "tpm/tpmtest"},
	"tpm/authpolicy":                 {},
	"tpm/nv":                         {"seal", "tpm", "tpm/authpolicy", "tpm/device", "tpm/keys"},
	"tpm/eventlog":                   {},
	"tpm/bootpolicy":                 {"internal/strictyaml", "tpm/eventlog"},
	"tpm/bootrule":                   {"tpm/eventlog"},
	"tpm/attest":                     {"seal", "tpm", "tpm/authpolicy", "tpm/bootpolicy", "tpm/bootrule", "tpm/device", "tpm/eventlog", "tpm/keys"},
	"tpm/predict":                    {"tpm/eventlog"},
	"tpm/simboot/peimage":            {},
	"tpm/bootstate":                  {"tpm/authpolicy"},
	"tpm/ekcert":                     {},
	"tpm/attest/exchange":            {"seal", "tpm/attest", "tpm/authpolicy", "tpm/bootpolicy", "tpm/eventlog", "tpm/keys"},
	"tpm/attest/joinproof":           {"seal", "tpm", "tpm/attest", "tpm/attest/exchange", "tpm/authpolicy", "tpm/bootpolicy", "tpm/bootrule", "tpm/device", "tpm/keys", "tpm/nv"},
	"tpm/attest/remote":              {"seal", "tpm", "tpm/attest", "tpm/attest/exchange", "tpm/authpolicy", "tpm/bootpolicy", "tpm/keys"},
	"tpm/simboot":                    {"tpm/device", "tpm/eventlog", "tpm/keys", "tpm/simboot/peimage"},
	"tpm/slowtpm":                    {},
	"tpm/tpmtest":                    {"tpm/device", "tpm/simboot"},
	"grpcserver":                     {"seal", "grpcserver/internal/panics", "grpcserver/internal/unixsocket"},
	"grpcserver/admin":               {"seal", "grpcserver/internal/panics", "grpcserver/internal/unixsocket"},
	"grpcserver/monitor":             {"grpcserver/internal/unixsocket"},
	"grpcserver/verifier":            {"seal", "grpcserver/internal/exchange", "internal/ownership", "tpm/attest/remote"},
	"grpcserver/kmsplugin":           {"seal", "grpcserver/internal/unixsocket"},
	"grpcserver/join":                {"grpcserver/internal/exchange", "seal", "tpm/attest/exchange", "tpm/attest/joinproof", "tpm/keys"},
	"grpcserver/internal/exchange":   {"seal", "grpcserver/internal/panics", "tpm/attest", "tpm/attest/exchange"},
	"deploy/hooks":                   {},
	"hsm":                            {"internal/ownership", "seal"},
	"vault":                          {"internal/ownership", "seal"},
	"grpcserver/internal/panics":     {},
	"grpcserver/internal/unixsocket": {"internal/ownership", "seal"},
	"internal/ownership":             {"seal"},
	"internal/strictyaml":            {},
	"internal/powerloss":             {},
	"internal/supervise":             {},

	// The command, floor by floor: each package imports only packages above it.
	"internal/config":           {"grpcserver/kmsplugin", "grpcserver/verifier", "hsm", "internal/ownership", "internal/strictyaml", "seal", "tpm/attest", "tpm/bootrule", "tpm/device", "tpm/keys", "tpm/nv", "vault"},
	"internal/files":            {"internal/ownership", "seal", "tpm/bootpolicy", "tpm/bootstate"},
	"internal/version":          {},
	"internal/slotview":         {"grpcserver/kmsplugin", "hsm", "seal", "seal/both", "seal/keyring", "seal/recovery", "tpm", "tpm/bootstate", "tpm/eventlog", "tpm/keys", "vault"},
	"internal/clusteraccess":    {"deploy/cluster", "internal/files", "internal/ownership", "seal", "seal/store/kube", "tpm/attest", "tpm/credential"},
	"internal/slotrecord":       {"internal/slotview", "seal", "seal/keyring", "seal/store", "seal/unlock"},
	"internal/node":             {"internal/slotrecord", "grpcserver/kmsplugin", "grpcserver/admin", "grpcserver/verifier", "hsm", "internal/clusteraccess", "internal/config", "internal/files", "internal/ownership", "internal/slotview", "internal/version", "seal", "seal/both", "seal/keyring", "seal/recovery", "seal/replica", "seal/rotation", "seal/store", "seal/store/kube", "seal/unlock", "tpm", "tpm/attest", "tpm/attest/remote", "tpm/authpolicy", "tpm/bootpolicy", "tpm/bootrule", "tpm/bootstate", "tpm/credential", "tpm/device", "tpm/keys", "tpm/nv", "vault"},
	"internal/inspect":          {"internal/files", "internal/slotview", "tpm/attest", "tpm/bootpolicy", "tpm/eventlog"},
	"internal/reseal":           {"grpcserver/admin", "internal/config", "internal/files", "internal/node", "internal/slotview", "seal", "seal/keyring", "seal/rotation", "seal/store", "tpm", "tpm/attest", "tpm/authpolicy", "tpm/bootpolicy", "tpm/bootstate", "tpm/eventlog", "tpm/keys", "tpm/predict"},
	"internal/status":           {"grpcserver/admin", "internal/node", "internal/rollout", "internal/slotview", "internal/version", "seal", "seal/keyring", "seal/unlock", "tpm", "tpm/eventlog", "tpm/keys"},
	"internal/founding":         {"hsm", "internal/config", "internal/files", "internal/node", "internal/reseal", "internal/slotview", "seal", "seal/keyring", "seal/recovery", "seal/rotation", "tpm/nv"},
	"internal/lifecycle":        {"grpcserver/admin", "hsm", "internal/config", "internal/files", "internal/node", "internal/reseal", "internal/slotview", "seal", "seal/keyring", "seal/recovery", "seal/rotation", "seal/store", "seal/unlock", "tpm", "tpm/nv"},
	"internal/rollout":          {"grpcserver/admin", "internal/lifecycle", "internal/node", "internal/slotview", "seal", "seal/both", "seal/keyring", "seal/replica", "seal/rotation", "tpm", "tpm/keys", "tpm/nv"},
	"internal/slots":            {"grpcserver/admin", "internal/files", "internal/node", "internal/reseal", "internal/slotview", "seal", "seal/both", "seal/keyring", "seal/recovery", "seal/rotation", "tpm", "tpm/credential"},
	"internal/members":          {"grpcserver/admin", "grpcserver/join", "internal/files", "internal/leaving", "internal/node", "internal/reseal", "internal/rollout", "internal/slotview", "seal", "seal/both", "seal/keyring", "seal/store", "tpm", "tpm/attest", "tpm/attest/exchange", "tpm/attest/joinproof", "tpm/attest/remote", "tpm/bootpolicy", "tpm/nv"},
	"internal/leaving":          {"grpcserver/admin", "internal/config", "internal/node", "internal/rollout", "internal/slotview", "seal", "seal/keyring", "seal/rotation", "seal/store", "tpm"},
	"internal/carry":            {"grpcserver/admin", "internal/node", "seal", "seal/keyring"},
	"internal/operation":        {"grpcserver/admin", "internal/carry", "internal/lifecycle", "internal/node", "internal/prune", "internal/reseal", "internal/rollout", "internal/slots", "internal/status"},
	"internal/serve":            {"grpcserver", "grpcserver/admin", "grpcserver/monitor", "internal/config", "internal/members", "internal/node", "internal/operation", "internal/reseal", "internal/rollout", "internal/slots", "internal/slotview", "internal/status", "internal/supervise", "internal/version", "seal", "seal/keyring", "seal/replica", "seal/store", "seal/unlock", "tpm"},
	"internal/verifierd":        {"grpcserver/monitor", "grpcserver/verifier", "internal/config", "internal/files", "internal/ownership", "internal/strictyaml", "internal/supervise", "internal/version", "seal", "tpm/attest/remote", "tpm/bootstate", "tpm/ekcert"},
	"internal/dev":              {"internal/config", "internal/founding", "internal/node", "internal/serve", "seal", "seal/recovery", "seal/store", "tpm/simboot"},
	"internal/encryptionconfig": {},
	"internal/doctor":           {"grpcserver/admin", "internal/config", "internal/encryptionconfig", "internal/files", "internal/kubeadm", "internal/slotview", "seal"},
	"internal/kubeadm":          {"internal/encryptionconfig", "internal/files", "seal"},
	"internal/etcdfile":         {},
	"internal/prune":            {"grpcserver/admin", "internal/files", "internal/node", "seal", "seal/keyring", "seal/unlock"},
	"internal/migrate":          {"seal", "seal/store/kube"},
	"internal/usage":            {"internal/etcdfile", "seal"},
	"internal/usage/usagetest":  {},
	"cmd/kleidi":                {"grpcserver", "grpcserver/admin", "grpcserver/join", "hsm", "internal/carry", "internal/clusteraccess", "internal/config", "internal/dev", "internal/doctor", "internal/encryptionconfig", "internal/files", "internal/founding", "internal/inspect", "internal/kubeadm", "internal/leaving", "internal/lifecycle", "internal/members", "internal/migrate", "internal/node", "internal/operation", "internal/ownership", "internal/prune", "internal/reseal", "internal/serve", "internal/slots", "internal/slotview", "internal/usage", "internal/verifierd", "internal/version", "seal", "seal/keyring", "seal/store", "seal/store/kube", "tpm", "tpm/attest", "tpm/bootpolicy", "tpm/bootstate", "tpm/eventlog", "tpm/simboot"},
}

// doors names the folders through which a library enters.
var doors = map[string][]string{
	"github.com/google/go-tpm/":         {"tpm"},
	"github.com/google/go-attestation/": {"tpm/attest"},
	"github.com/google/go-tpm-tools/":   {"tpm/attest"},
	"filippo.io/age":                    {"seal/recovery"},
	"github.com/miekg/pkcs11":           {"hsm"},
	"github.com/hashicorp/vault/":       {"vault"},
	"google.golang.org/grpc":            {"grpcserver", "internal/dev", "internal/usage"},
	"k8s.io/kms/":                       {"grpcserver", "internal/dev"},
	"github.com/prometheus/":            {"grpcserver", "internal/serve", "internal/verifierd"},
	"github.com/spf13/":                 {"cmd/kleidi"},
	"k8s.io/client-go/":                 {"seal/store/kube"},
}

func TestBorders(t *testing.T) {
	for path, imports := range packages(t) {
		if strings.HasPrefix(path, "e2e/") {
			continue // may import everything
		}
		allowed, ok := borders[path]
		if !ok {
			t.Errorf("package %s has no border here", path)
		}
		for _, i := range imports {
			if own, ok := strings.CutPrefix(i, module); ok && !slices.Contains(allowed, own) {
				t.Errorf("%s imports %s", path, own)
			}
		}
	}
}

func TestLibrariesEnterThroughTheirDoor(t *testing.T) {
	for path, imports := range packages(t) {
		for library, folders := range doors {
			enters := slices.ContainsFunc(imports, func(i string) bool { return strings.HasPrefix(i, library) })
			inside := slices.ContainsFunc(folders, func(f string) bool { return path == f || strings.HasPrefix(path, f+"/") })
			if enters && !inside && !strings.HasPrefix(path, "e2e/") {
				t.Errorf("%s imports %s", path, library)
			}
		}
	}
}

// TestEveryPackageIsOnTheMap: docs/architecture.md has a row for each package.
func TestEveryPackageIsOnTheMap(t *testing.T) {
	page, err := os.ReadFile(filepath.Join("..", "..", "docs", "architecture.md"))
	if err != nil {
		t.Fatal(err)
	}
	for path := range borders {
		if n := strings.Count(string(page), "\n| `"+path+"` | "); n != 1 {
			t.Errorf("docs/architecture.md has %d rows for %s", n, path)
		}
	}
}

// TestEveryPackageHasTests: each package under internal has unit tests of its own.
func TestEveryPackageHasTests(t *testing.T) {
	for path := range borders {
		if !strings.HasPrefix(path, "internal/") || strings.HasSuffix(path, "test") { // helps the tests of others
			continue
		}
		if tests, err := filepath.Glob(filepath.Join("..", "..", path, "*_test.go")); err != nil || len(tests) == 0 {
			t.Errorf("%s has no tests, %v", path, err)
		}
	}
}

// packages returns each package of the module with its imports, without tests.
func packages(t *testing.T) map[string][]string {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports", module+"...")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	all := map[string][]string{}
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p struct {
			ImportPath string
			Imports    []string
		}
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		all[strings.TrimPrefix(p.ImportPath, module)] = p.Imports
	}
	if len(all) < len(borders) {
		t.Fatalf("go list knows %d packages, at least %d were expected", len(all), len(borders))
	}
	return all
}

// Bounds of a package and of a type: in larger ones a reader loses the thread.
const (
	maxLines   = 1300 // of a package, without tests and generated code
	maxMethods = 40   // of a type
)

// larger are the larger packages, with their bounds: see docs/decisions/package-sizes.md.
var larger = map[string]int{
	"seal/keyring":   2900,
	"tpm/eventlog":   2500,
	"tpm/bootpolicy": 1850,
	"tpm/predict":    2450,
	"tpm/simboot":    1400,
	"tpm/attest":     1350,
	"hsm":            2400,
	"vault":          2050,
	"cmd/kleidi":     5100,
}

func TestPackagesAndTypesStaySmall(t *testing.T) {
	lines, methods := map[string]int{}, map[string]int{}
	root := filepath.Join("..", "..")
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		name := d.Name()
		if err != nil {
			return err
		}
		if d.IsDir() && (name == "e2e" || name == "testdata" || path != root && strings.HasPrefix(name, ".") && name != "..") {
			return fs.SkipDir
		}
		if !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") || strings.HasSuffix(name, ".pb.go") {
			return nil
		}
		files := token.NewFileSet()
		file, err := parser.ParseFile(files, path, nil, 0)
		if err != nil {
			return err
		}
		folder, err := filepath.Rel(root, filepath.Dir(path))
		lines[folder] += files.Position(file.FileEnd).Line
		for _, decl := range file.Decls {
			if f, ok := decl.(*ast.FuncDecl); ok && f.Recv != nil {
				methods[folder+"."+receiver(f.Recv.List[0].Type)]++
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for folder := range borders {
		if folder != "deploy/hooks" && lines[folder] == 0 { // deploy/hooks holds only a test
			t.Errorf("no line of %s was read", folder)
		}
	}
	for folder, n := range lines {
		if most := max(maxLines, larger[folder]); n > most {
			t.Errorf("%s has %d lines, at most %d are wanted", folder, n, most)
		}
	}
	for name, n := range methods {
		if n > maxMethods {
			t.Errorf("%s has %d methods, at most %d are wanted", name, n, maxMethods)
		}
	}
}

// receiver returns the name of a method's type.
func receiver(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.StarExpr:
		return receiver(e.X)
	case *ast.IndexExpr:
		return receiver(e.X)
	case *ast.IndexListExpr:
		return receiver(e.X)
	case *ast.Ident:
		return e.Name
	}
	return "?"
}
