package seal_test

import (
	"os/exec"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
)

// TestQuote lets a shell read the output of Quote.
func TestQuote(t *testing.T) {
	for in, want := range map[string]string{
		"/etc/kleidi/boot-policy.yaml": "/etc/kleidi/boot-policy.yaml",
		"a b":                          "'a b'",
		"":                             "''",
		"it's":                         `'it'\''s'`,
		"$(id) `id` \\ \" ~ * ; & é":   "'$(id) `id` \\ \" ~ * ; & é'",
		"-file":                        "-file",
		"a\nb":                         "'a\nb'",
	} {
		got := seal.Quote(in)
		if got != want {
			t.Errorf("%q: %s, want %s", in, got, want)
		}
		out, err := exec.Command("sh", "-c", "printf %s "+got).Output()
		if in == "-file" { // printf's own option
			continue
		}
		if err != nil || string(out) != in {
			t.Errorf("%q: the shell reads %q, %v", in, out, err)
		}
	}
}
