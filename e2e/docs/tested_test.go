package docs

import (
	"os"
	"os/exec"
	"path"
	"regexp"
	"strings"
	"testing"
)

// listed matches the paths below deploy/ that docs/tested.md names. A path stands for
// everything below it.
var listed = regexp.MustCompile("`(deploy/[^` ]+)`")

// TestEveryFileIsTested: docs/tested.md says of each file in deploy/ where it was run, or why
// not, and names no file that is not there.
func TestEveryFileIsTested(t *testing.T) {
	page, err := os.ReadFile("../../docs/tested.md")
	if err != nil {
		t.Fatal(err)
	}
	named := map[string]bool{}
	for _, m := range listed.FindAllStringSubmatch(string(page), -1) {
		named[m[1]] = true
		if _, err := os.Stat("../../" + m[1]); err != nil {
			t.Errorf("docs/tested.md: %v", err)
		}
	}
	out, err := exec.Command("git", "-C", "../..", "ls-files", "--cached", "--others", "--exclude-standard", "deploy").Output()
	if err != nil {
		t.Fatal(err)
	}
	files := strings.Fields(string(out))
	if len(files) < 40 {
		t.Fatalf("git lists only %d files in deploy/", len(files))
	}
	for _, file := range files {
		at := file
		for at != "deploy" && !named[at] {
			at = path.Dir(at)
		}
		if at == "deploy" && !strings.HasSuffix(file, ".go") {
			t.Errorf("docs/tested.md does not say where %s was run, nor why not", file)
		}
	}
}
