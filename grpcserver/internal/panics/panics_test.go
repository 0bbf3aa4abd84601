package panics

import (
	"bytes"
	"encoding/json"
	"errors"
	"log/slog"
	"strings"
	"testing"
)

type holder struct{ Key string }

// caught lets f panic, and returns the log line about it.
func caught(t *testing.T, f func()) (line string) {
	t.Helper()
	var out bytes.Buffer
	func() {
		defer func() {
			if v := recover(); v != nil {
				Log(slog.New(slog.NewJSONHandler(&out, nil)), "Decrypt", v)
			}
		}()
		f()
	}()
	return out.String()
}

func blowUp(value any) { panic(value) }

// TestLogKeepsTheValueBack: the line names the type of a panic's value and where the
// panic happened. The contents of the value stay out, however the value could print
// itself.
func TestLogKeepsTheValueBack(t *testing.T) {
	const secret = "0123456789abcdef"
	for typ, value := range map[string]any{
		"string":              secret,
		"*errors.errorString": errors.New(secret),
		"panics.holder":       holder{secret},
		"*panics.holder":      &holder{secret},
		"[]uint8":             []byte(secret),
		"map[string]string":   map[string]string{secret: secret},
	} {
		line := caught(t, func() { blowUp(value) })
		var got struct {
			Level, In, Type string
			Stack           []string
		}
		if err := json.Unmarshal([]byte(line), &got); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		if got.Level != "ERROR" || got.In != "Decrypt" || got.Type != typ {
			t.Errorf("%s: %+v", typ, got)
		}
		if strings.Contains(line, secret) {
			t.Errorf("%s: the value is in the log: %s", typ, line)
		}
		if !strings.Contains(strings.Join(got.Stack, " "), "panics.blowUp:") {
			t.Errorf("%s: the stack does not say where: %q", typ, got.Stack)
		}
		if strings.Contains(strings.Join(got.Stack, " "), "panics.stack:") {
			t.Errorf("%s: the stack begins inside this package: %q", typ, got.Stack)
		}
	}
}

// TestStackIsBounded: a runaway recursion does not fill the log.
func TestStackIsBounded(t *testing.T) {
	var deeper func(n int)
	deeper = func(n int) {
		if n == 0 {
			blowUp("deep")
		}
		deeper(n - 1)
	}
	var got struct{ Stack []string }
	if err := json.Unmarshal([]byte(caught(t, func() { deeper(10 * maxFrames) })), &got); err != nil {
		t.Fatal(err)
	}
	if len(got.Stack) != maxFrames {
		t.Errorf("%d frames, want %d", len(got.Stack), maxFrames)
	}
}
