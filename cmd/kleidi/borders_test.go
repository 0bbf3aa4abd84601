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
	"regexp"
	"slices"
	"strconv"
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
	"seal/store/kube":                {"internal/regular", "seal", "seal/store"},
	"seal/store/kube/kubetest":       {"seal/store/kube"},
	"deploy/cluster":                 {},
	"seal/unlock":                    {"seal", "seal/keyring", "seal/store"},
	"seal/rotation":                  {"seal", "seal/keyring"},
	"seal/replica":                   {"seal", "seal/keyring", "seal/rotation", "seal/store", "seal/unlock"},
	"seal/replica/storetest":         {"seal/replica", "seal/store"},
	"seal/both":                      {"seal"},
	"seal/recovery":                  {"seal"},
	"seal/sealtest":                  {"seal"},
	"hsm/internal/cheap":             {},
	"hsm/internal/keyslot":           {"seal"},
	"hsm/internal/uri":               {"hsm/internal/keyslot"},
	"hsm/internal/pinfile":           {"internal/ownership", "internal/regular", "seal"},
	"hsm/internal/legacy":            {"hsm/internal/pinfile", "seal"},
	"hsm/internal/cryptoki":          {"hsm/internal/keyslot", "hsm/internal/pinfile", "internal/ownership", "seal"},
	"tpm/device":                     {"seal"},
	"tpm/keys":                       {"internal/ownership", "internal/regular", "seal", "tpm/authpolicy", "tpm/device"},
	"tpm":                            {"seal", "tpm/authpolicy", "tpm/device", "tpm/keys"},
	"tpm/credential":                 {"seal", "tpm/authpolicy", "tpm/device", "tpm/keys"},
	"tpm/internal/nodetest":          {"seal", "tpm", "tpm/attest", "tpm/keys", "tpm/nv", "tpm/simboot", "tpm/tpmtest"},
	"tpm/authpolicy":                 {},
	"tpm/nv":                         {"seal", "tpm", "tpm/authpolicy", "tpm/device", "tpm/keys"},
	"tpm/eventlog":                   {},
	"tpm/bootpolicy":                 {"internal/strictyaml", "tpm/eventlog"},
	"tpm/bootrule":                   {"tpm/eventlog"},
	"tpm/attest/internal/readonce":   {},
	"tpm/attest":                     {"internal/regular", "seal", "tpm", "tpm/attest/internal/readonce", "tpm/authpolicy", "tpm/bootpolicy", "tpm/bootrule", "tpm/device", "tpm/eventlog", "tpm/keys"},
	"tpm/predict":                    {"tpm/eventlog"},
	"tpm/simboot/peimage":            {},
	"tpm/bootstate":                  {"tpm/authpolicy"},
	"tpm/ekcert":                     {},
	"tpm/attest/exchange":            {"seal", "tpm/attest", "tpm/authpolicy", "tpm/bootpolicy", "tpm/eventlog", "tpm/keys"},
	"tpm/attest/joinproof":           {"seal", "tpm", "tpm/attest", "tpm/attest/exchange", "tpm/authpolicy", "tpm/bootpolicy", "tpm/bootrule", "tpm/device", "tpm/keys", "tpm/nv"},
	"tpm/attest/remote":              {"seal", "tpm", "tpm/attest", "tpm/attest/exchange", "tpm/authpolicy", "tpm/bootpolicy", "tpm/keys"},
	"tpm/simboot/internal/swtpm":     {},
	"tpm/simboot":                    {"tpm/device", "tpm/eventlog", "tpm/keys", "tpm/simboot/internal/swtpm", "tpm/simboot/peimage"},
	"tpm/slowtpm":                    {},
	"tpm/tpmtest":                    {"tpm/device", "tpm/simboot"},
	"grpcserver":                     {"seal", "grpcserver/internal/panics", "grpcserver/internal/unixsocket"},
	"grpcserver/admin":               {"seal", "grpcserver/internal/panics", "grpcserver/internal/unixsocket"},
	"grpcserver/monitor":             {"grpcserver/internal/unixsocket"},
	"grpcserver/verifier":            {"seal", "grpcserver/internal/exchange", "internal/ownership", "tpm/attest/remote", "internal/regular"},
	"grpcserver/kmsplugin":           {"seal", "grpcserver/internal/unixsocket"},
	"grpcserver/join":                {"grpcserver/internal/exchange", "seal", "seal/keyring", "tpm/attest/exchange", "tpm/attest/joinproof", "tpm/keys"},
	"grpcserver/internal/exchange":   {"seal", "grpcserver/internal/panics", "tpm/attest", "tpm/attest/exchange"},
	"deploy/hooks":                   {},
	"hsm":                            {"hsm/internal/cryptoki", "hsm/internal/keyslot", "hsm/internal/legacy", "hsm/internal/pinfile", "hsm/internal/uri", "seal"},
	"vault/internal/client":          {"seal"},
	"vault/internal/credfile":        {"internal/ownership", "internal/regular", "seal"},
	"vault/internal/lifetime":        {},
	"vault/internal/transitslot":     {"seal"},
	"vault":                          {"seal", "vault/internal/client", "vault/internal/credfile", "vault/internal/lifetime", "vault/internal/transitslot"},
	"grpcserver/internal/panics":     {},
	"grpcserver/internal/unixsocket": {"internal/ownership", "seal"},
	"internal/ownership":             {"seal"},
	"internal/regular":               {},
	"internal/strictyaml":            {},
	"internal/powerloss":             {},
	"internal/supervise":             {},

	// The command, floor by floor: each package imports only packages above it.
	"internal/config":            {"grpcserver/kmsplugin", "grpcserver/verifier", "hsm", "internal/ownership", "internal/regular", "internal/strictyaml", "seal", "tpm/attest", "tpm/bootrule", "tpm/device", "tpm/keys", "tpm/nv", "vault"},
	"internal/files":             {"internal/ownership", "internal/regular", "seal", "tpm/bootpolicy", "tpm/bootstate"},
	"internal/version":           {},
	"internal/slotview":          {"grpcserver/kmsplugin", "hsm", "seal", "seal/both", "seal/keyring", "seal/recovery", "tpm", "tpm/bootstate", "tpm/eventlog", "tpm/keys", "vault"},
	"internal/clusteraccess":     {"deploy/cluster", "internal/files", "internal/ownership", "seal", "seal/keyring", "seal/replica", "seal/store", "seal/store/kube", "tpm/attest", "tpm/credential"},
	"internal/slotrecord":        {"internal/slotview", "seal", "seal/keyring", "seal/store", "seal/unlock"},
	"internal/node":              {"internal/slotrecord", "grpcserver/kmsplugin", "grpcserver/admin", "grpcserver/verifier", "hsm", "internal/clusteraccess", "internal/config", "internal/files", "internal/ownership", "internal/slotview", "internal/version", "seal", "seal/both", "seal/keyring", "seal/recovery", "seal/replica", "seal/rotation", "seal/store", "seal/unlock", "tpm", "tpm/attest", "tpm/attest/remote", "tpm/authpolicy", "tpm/bootpolicy", "tpm/bootrule", "tpm/bootstate", "tpm/credential", "tpm/device", "tpm/keys", "tpm/nv", "vault"},
	"internal/node/nodetest":     {"grpcserver", "internal/config", "internal/node", "seal", "seal/keyring", "seal/recovery", "seal/unlock"},
	"internal/inspect":           {"grpcserver/admin", "internal/files", "internal/slotview", "seal", "tpm/attest", "tpm/bootpolicy", "tpm/eventlog"},
	"internal/reseal":            {"grpcserver/admin", "internal/config", "internal/files", "internal/node", "internal/slotview", "seal", "seal/keyring", "seal/rotation", "seal/store", "tpm", "tpm/attest", "tpm/authpolicy", "tpm/bootpolicy", "tpm/bootstate", "tpm/eventlog", "tpm/keys", "tpm/predict"},
	"internal/status":            {"grpcserver/admin", "internal/node", "internal/rollout", "internal/slotview", "internal/version", "seal", "seal/keyring", "seal/unlock", "tpm", "tpm/eventlog", "tpm/keys"},
	"internal/founding":          {"hsm", "internal/config", "internal/files", "internal/node", "internal/reseal", "internal/slotview", "seal", "seal/keyring", "seal/recovery", "seal/rotation", "tpm/nv"},
	"internal/foundingtest":      {"internal/founding", "internal/node", "internal/node/nodetest"},
	"internal/lifecycle":         {"grpcserver/admin", "internal/config", "internal/files", "internal/node", "internal/reseal", "internal/slotview", "seal", "seal/keyring", "seal/recovery", "seal/rotation", "seal/store", "seal/unlock", "tpm"},
	"internal/rollout":           {"grpcserver/admin", "internal/lifecycle", "internal/node", "internal/slotview", "seal", "seal/both", "seal/keyring", "seal/replica", "seal/rotation", "tpm", "tpm/keys", "tpm/nv"},
	"internal/slots":             {"grpcserver/admin", "internal/files", "internal/node", "internal/reseal", "internal/slotview", "seal", "seal/both", "seal/keyring", "seal/recovery", "seal/rotation", "tpm", "tpm/credential"},
	"internal/members":           {"grpcserver/admin", "grpcserver/join", "internal/files", "internal/leaving", "internal/node", "internal/reseal", "internal/rollout", "internal/slotview", "seal", "seal/both", "seal/keyring", "seal/store", "tpm", "tpm/attest", "tpm/attest/exchange", "tpm/attest/joinproof", "tpm/attest/remote", "tpm/bootpolicy", "tpm/nv"},
	"internal/leaving":           {"grpcserver/admin", "internal/clusteraccess", "internal/config", "internal/node", "internal/rollout", "internal/slotview", "seal", "seal/keyring", "seal/rotation", "seal/store", "tpm"},
	"internal/carry":             {"grpcserver/admin", "internal/node", "seal", "seal/keyring"},
	"internal/operation":         {"grpcserver/admin", "internal/carry", "internal/lifecycle", "internal/node", "internal/prune", "internal/reseal", "internal/rollout", "internal/slots", "internal/status"},
	"internal/serve":             {"grpcserver", "grpcserver/admin", "grpcserver/monitor", "internal/config", "internal/members", "internal/node", "internal/operation", "internal/reseal", "internal/rollout", "internal/slots", "internal/slotview", "internal/status", "internal/supervise", "internal/version", "seal", "seal/keyring", "seal/replica", "seal/store", "seal/unlock", "tpm"},
	"internal/verifierd":         {"grpcserver/monitor", "grpcserver/verifier", "internal/config", "internal/files", "internal/ownership", "internal/strictyaml", "internal/supervise", "internal/version", "seal", "tpm/attest/remote", "tpm/bootstate", "tpm/ekcert"},
	"internal/dev":               {"internal/config", "internal/founding", "internal/node", "internal/serve", "seal", "seal/recovery", "seal/store", "tpm/simboot"},
	"internal/encryptionconfig":  {"internal/files", "internal/strictyaml", "seal"},
	"internal/doctor":            {"grpcserver/admin", "internal/config", "internal/doctor/credential", "internal/doctor/diagnosis", "internal/encryptionconfig", "internal/files", "internal/kubeadm", "internal/slotview", "seal"},
	"internal/doctor/bundle":     {"grpcserver/admin", "internal/config", "internal/doctor", "internal/doctor/diagnosis", "internal/files", "seal"},
	"internal/doctor/credential": {"internal/doctor/diagnosis", "seal"},
	"internal/doctor/diagnosis":  {"seal"},
	"internal/doctor/gather":     {"grpcserver/admin", "internal/doctor", "internal/doctor/credential", "internal/files", "internal/node", "internal/operation", "internal/reseal", "seal", "seal/store/kube", "tpm", "tpm/attest", "tpm/bootrule", "tpm/eventlog", "tpm/keys", "tpm/predict"},
	"internal/kubeadm":           {"internal/encryptionconfig", "internal/files", "seal"},
	"internal/etcdfile":          {},
	"internal/prune":             {"grpcserver/admin", "internal/carry", "internal/config", "internal/files", "internal/node", "internal/rollout", "internal/usage", "seal", "seal/keyring", "seal/recovery", "seal/rotation", "seal/store", "seal/unlock"},
	"internal/migrate":           {"seal", "seal/store/kube"},
	"internal/usage":             {"internal/etcdfile", "internal/regular", "seal"},
	"internal/usage/usagetext":   {"internal/usage", "seal"},
	"internal/usage/wanted":      {"internal/encryptionconfig", "internal/usage"},
	"internal/usage/usagetest":   {},
	"internal/terminal":          {"hsm", "internal/regular", "seal"},
	"internal/text":              {"grpcserver/admin", "internal/clusteraccess", "internal/config", "internal/founding", "internal/inspect", "internal/leaving", "internal/members", "internal/reseal", "internal/slots", "internal/slotview", "internal/verifierd", "seal", "seal/keyring", "tpm", "tpm/bootpolicy", "tpm/eventlog"},
	"internal/completion":        {"internal/slotview", "seal/keyring"},
	"internal/follow":            {"grpcserver/admin", "internal/text", "seal"},
	"cmd/kleidi":                 {"grpcserver", "grpcserver/admin", "grpcserver/join", "hsm", "internal/carry", "internal/clusteraccess", "internal/completion", "internal/config", "internal/dev", "internal/doctor", "internal/doctor/bundle", "internal/doctor/gather", "internal/encryptionconfig", "internal/files", "internal/follow", "internal/founding", "internal/inspect", "internal/kubeadm", "internal/leaving", "internal/lifecycle", "internal/members", "internal/migrate", "internal/node", "internal/operation", "internal/ownership", "internal/prune", "internal/reseal", "internal/serve", "internal/slots", "internal/slotview", "internal/terminal", "internal/text", "internal/usage", "internal/usage/usagetext", "internal/usage/wanted", "internal/verifierd", "internal/version", "seal", "seal/keyring", "seal/store/kube", "tpm/attest", "tpm/bootpolicy", "tpm/bootstate", "tpm/simboot"},
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

// TestEveryPackageImportsWhatTheMapSays: the map's column of imports matches the code,
// and no border allows an import that nothing uses. The row of cmd/kleidi names none.
func TestEveryPackageImportsWhatTheMapSays(t *testing.T) {
	page, err := os.ReadFile(filepath.Join("..", "..", "docs", "architecture.md"))
	if err != nil {
		t.Fatal(err)
	}
	imports := packages(t)
	rows := mapRow.FindAllStringSubmatch(string(page), -1)
	if len(rows) < len(borders) {
		t.Fatalf("docs/architecture.md: %d rows of packages were read, %d packages have a border", len(rows), len(borders))
	}
	for _, row := range rows {
		path, says := row[1], []string{}
		for _, name := range quoted.FindAllStringSubmatch(row[2], -1) {
			says = append(says, name[1])
		}
		uses := []string{}
		for _, i := range imports[path] {
			if own, ok := strings.CutPrefix(i, module); ok {
				uses = append(uses, own)
			}
		}
		if path != "cmd/kleidi" && !sameSet(says, uses) {
			t.Errorf("docs/architecture.md: the row of %s names the imports %q, the code has %q", path, says, uses)
		}
		if !sameSet(borders[path], uses) {
			t.Errorf("the border of %s allows %q, the code uses %q", path, borders[path], uses)
		}
	}
}

// A row of the map's table of packages: the package, its job, its imports.
var (
	mapRow = regexp.MustCompile("(?m)^\\| `([a-z0-9/]+)` \\| [^|]+ \\| ([^|]*)\\|$")
	quoted = regexp.MustCompile("`([^`]+)`")
)

func sameSet(a, b []string) bool {
	return slices.Equal(slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b)))
}

// TestEveryPackagePathOfTheMapExists: the files and folders to which the map sends a
// reader exist. A file without a folder is in the folder of the path before it.
func TestEveryPackagePathOfTheMapExists(t *testing.T) {
	page, err := os.ReadFile(filepath.Join("..", "..", "docs", "architecture.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, places, _ := strings.Cut(string(page), "## Where does my change go?")
	places, _, _ = strings.Cut(places, "## Run one test")
	folder, n := "", 0
	for _, word := range quoted.FindAllStringSubmatch(places, -1) {
		path, isFile := word[1], strings.HasSuffix(word[1], ".go")
		switch {
		case strings.Contains(path, " ") || !strings.Contains(path, "/") && !isFile:
			continue // a command, or a name in the code
		case !strings.Contains(path, "/"):
			path = folder + "/" + path
		case isFile:
			folder = filepath.Dir(path)
		default:
			folder = path
		}
		if found, err := filepath.Glob(filepath.Join("..", "..", path)); err != nil || len(found) == 0 {
			t.Errorf("docs/architecture.md sends a reader to %s, which does not exist", path)
		}
		n++
	}
	if n < 50 {
		t.Errorf("only %d places were found on the map", n)
	}
}

// TestEveryPackageHasTests: each package under internal has unit tests of its own.
func TestEveryPackageHasTests(t *testing.T) {
	for path := range borders {
		if !strings.HasPrefix(path, "internal/") || strings.HasSuffix(path, "test") { // it helps the tests of other packages
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

// Bounds of a package, a type and a function: in larger ones a reader loses the thread.
const (
	maxLines   = 1300 // of a package, without tests and generated code
	maxMethods = 40   // of a type
	maxBody    = 60   // lines of a function
	slack      = 250  // lines by which a package may be below its own bound
)

// larger returns the larger packages with their bounds, from docs/decisions/package-sizes.md.
func larger(t *testing.T) map[string]int {
	t.Helper()
	page, err := os.ReadFile(filepath.Join("..", "..", "docs", "decisions", "package-sizes.md"))
	if err != nil {
		t.Fatal(err)
	}
	bounds := map[string]int{}
	for _, row := range largeRow.FindAllStringSubmatch(string(page), -1) {
		if bounds[row[1]], err = strconv.Atoi(strings.ReplaceAll(row[2], ",", "")); err != nil {
			t.Fatal(err)
		}
	}
	if len(bounds) == 0 {
		t.Fatal("docs/decisions/package-sizes.md has no row of a package")
	}
	return bounds
}

// A row of the table of larger packages: the package, its bound.
var largeRow = regexp.MustCompile("(?m)^\\| `([a-z0-9/]+)` \\| ([0-9,]+) \\|")

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
			f, ok := decl.(*ast.FuncDecl)
			if !ok {
				continue
			}
			if n := files.Position(f.End()).Line - files.Position(f.Pos()).Line + 1; n > maxBody {
				t.Errorf("%s: %s has %d lines, at most %d are wanted", path, f.Name.Name, n, maxBody)
			}
			if f.Recv != nil {
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
	bounds := larger(t)
	for folder, n := range lines {
		bound := bounds[folder]
		if most := max(maxLines, bound); n > most {
			t.Errorf("%s has %d lines, at most %d are wanted", folder, n, most)
		}
		if bound > 0 && n < bound-slack {
			t.Errorf("%s has %d lines: lower its bound of %d in docs/decisions/package-sizes.md, or remove it", folder, n, bound)
		}
	}
	for folder := range bounds {
		if lines[folder] == 0 {
			t.Errorf("docs/decisions/package-sizes.md has a row for %s, of which no line was read", folder)
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

// circles are the packages in which files still use each other, with the reason. The table
// may only shrink: a package without a circle has no row.
var circles = map[string]string{
	"hsm":          "a key, its mechanism and the session on the token name each other, on both sides of cgo",
	"seal/keyring": "the document, its two frozen formats and the open keyring are one proof in several files",
	"vault":        "login, errors and session explain an error together, as docs/decisions/package-sizes.md says",
}

// TestFilesRunOneWay: no two files of a package use each other, directly or through others.
// A reader can begin with the file that the others use, and never has to come back. What a
// method uses of its own type's other methods is not counted.
func TestFilesRunOneWay(t *testing.T) {
	for path := range circles {
		if _, ok := borders[path]; !ok {
			t.Errorf("%s is no package", path)
		}
	}
	for path := range borders {
		uses := fileUses(t, filepath.Join("..", "..", path))
		var circle []string
		for file := range uses {
			if way := wayBack(uses, file, file, map[string]bool{}); way != nil {
				circle = way
				break
			}
		}
		reason := circles[path]
		if circle != nil && reason == "" {
			t.Errorf("%s: files use each other: %s; move a declaration", path, strings.Join(circle, " -> "))
		}
		if circle == nil && reason != "" {
			t.Errorf("%s has no circle any more: remove its row", path)
		}
	}
}

// fileUses returns, for each file of a package, the files whose names it uses.
func fileUses(t *testing.T, folder string) map[string][]string {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(folder, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	declared, unresolved := map[string]string{}, map[string][]*ast.Ident{}
	for _, path := range paths {
		if strings.HasSuffix(path, "_test.go") || strings.HasSuffix(path, ".pb.go") {
			continue
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for name := range file.Scope.Objects {
			declared[name] = filepath.Base(path)
		}
		unresolved[filepath.Base(path)] = file.Unresolved
	}
	uses := map[string][]string{}
	for file, names := range unresolved {
		for _, name := range names {
			if other := declared[name.Name]; other != "" && other != file && !slices.Contains(uses[file], other) {
				uses[file] = append(uses[file], other)
			}
		}
	}
	return uses
}

// wayBack returns a way from one file to another, or nil.
func wayBack(uses map[string][]string, from, to string, seen map[string]bool) []string {
	for _, next := range uses[from] {
		if next == to {
			return []string{from, to}
		}
		if !seen[next] {
			seen[next] = true
			if way := wayBack(uses, next, to, seen); way != nil {
				return append([]string{from}, way...)
			}
		}
	}
	return nil
}
