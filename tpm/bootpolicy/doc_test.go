package bootpolicy

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

var yamlBlock = regexp.MustCompile("(?s)```yaml\n(.*?)```")

// TestDocumentedBootPolicies: the examples of docs/boot-policy.md work unchanged; a
// block without a head is a part.
func TestDocumentedBootPolicies(t *testing.T) {
	b, err := os.ReadFile("../../docs/boot-policy.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := yamlBlock.FindAllStringSubmatch(string(b), -1)
	if len(blocks) < 5 {
		t.Fatalf("%d blocks", len(blocks))
	}
	for _, m := range blocks {
		content := m[1]
		if !strings.HasPrefix(content, "apiVersion:") {
			content = head + content
		}
		if _, err := Parse([]byte(content)); err != nil {
			t.Errorf("%v\n%s", err, m[1])
		}
	}
}
