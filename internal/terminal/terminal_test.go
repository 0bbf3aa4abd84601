package terminal

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
)

// TestReadLine: a line ends at its newline or at the end, and nothing after it is read.
func TestReadLine(t *testing.T) {
	r := strings.NewReader("one\ntwo")
	for _, want := range []string{"one", "two"} {
		if b, err := ReadLine(r); err != nil || string(b) != want {
			t.Errorf("%q, %v; want %q", b, err, want)
		}
	}
	if _, err := ReadLine(r); err != io.EOF {
		t.Errorf("at the end: %v", err)
	}
	if b, err := ReadLine(strings.NewReader(strings.Repeat("x", Max) + "\n")); err == nil {
		t.Errorf("a line of more than %d bytes: %d bytes", Max, len(b))
	}
}

// TestPIN: without a terminal the PIN is one line, and nobody is asked twice.
func TestPIN(t *testing.T) {
	for text, want := range map[string]string{"1234\n": "1234", "1234\r\nmore": "1234", "1234": "1234", "": "", "\n": ""} {
		var prompts strings.Builder
		pin, err := Input{In: strings.NewReader(text), Err: &prompts}.PIN(t.Context(), seal.Memory{}, "")
		var got string
		if err == nil {
			pin.With(func(b []byte) { got = string(b) })
			pin.Close()
		} else if _, hint := seal.SplitHint(err); hint == "" {
			t.Errorf("%q: %v", text, err)
		}
		if got != want || prompts.Len() > 0 {
			t.Errorf("%q: PIN %q, %v, prompts %q", text, got, err, prompts.String())
		}
	}
}

// TestIdentity: the identity is the whole content of a file, or of standard input.
func TestIdentity(t *testing.T) {
	dir := t.TempDir()
	for text, says := range map[string]string{"# note\nAGE-SECRET-KEY-1\n": "", " \n": "no recovery identity was given", strings.Repeat("x", Max): "more than"} {
		file := filepath.Join(dir, "identity")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"", file} {
			b, err := Input{In: strings.NewReader(text), Err: io.Discard}.Identity(t.Context(), name)
			want := says
			if name != "" && says == "no recovery identity was given" {
				want = "is empty"
			}
			if want == "" && (err != nil || string(b) != text) || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
				t.Errorf("%.20q from %q: %q, %v", text, name, b, err)
			}
		}
	}
}
