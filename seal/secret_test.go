package seal

import (
	"bytes"
	"encoding/gob"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"strings"
	"testing"
)

func newSecret(t *testing.T, b string) *Secret {
	t.Helper()
	s, err := Memory{}.Take([]byte(b))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestSecretIsNeverSerialised(t *testing.T) {
	const plain = "hunter2hunter2hunter2hunter2abcd"
	s := newSecret(t, plain)
	var logged bytes.Buffer
	for _, h := range []slog.Handler{slog.NewJSONHandler(&logged, nil), slog.NewTextHandler(&logged, nil)} {
		slog.New(h).Info("m", "secret", s, "in", struct{ S *Secret }{s})
	}
	out := logged.String() + fmt.Sprintf("%v %+v %#v %s %x %q %d %v", s, s, s, s, s, s, s, []any{s, &s})
	hexed, b64 := fmt.Sprintf("%x", plain), "aHVudGVyMmh1bnRlcjJ"
	for _, leak := range []string{plain, plain[:8], hexed[:16], b64, "104 117 110"} {
		if strings.Contains(out, leak) {
			t.Errorf("output holds %q:\n%s", leak, out)
		}
	}
	if _, err := json.Marshal(s); err == nil {
		t.Error("json.Marshal succeeds")
	}
	if _, err := json.Marshal(map[string]any{"s": s}); err == nil {
		t.Error("json.Marshal of a map with a secret succeeds")
	}
	if err := gob.NewEncoder(&bytes.Buffer{}).Encode(s); err == nil {
		t.Error("gob succeeds")
	}
}

func TestTakeMovesAndCloseForgets(t *testing.T) {
	src := bytes.Repeat([]byte{7}, 32)
	s, err := Memory{}.Take(src)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(src, make([]byte, 32)) {
		t.Error("the source is not zeroed")
	}
	s.With(func(b []byte) {
		if !bytes.Equal(b, bytes.Repeat([]byte{7}, 32)) {
			t.Error("the secret differs")
		}
	})
	for range 2 {
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	s.With(func(b []byte) {
		if b != nil {
			t.Error("a closed secret still has bytes")
		}
	})
}

func TestEqual(t *testing.T) {
	a, b, c := newSecret(t, "same"), newSecret(t, "same"), newSecret(t, "diff")
	if !a.Equal(b) || !a.Equal(a) || a.Equal(c) || a.Equal(nil) || (*Secret)(nil).Equal(a) {
		t.Error("Equal is wrong")
	}
	c.Close()
	b.Close()
	if c.Equal(a) || a.Equal(c) || b.Equal(c) {
		t.Error("a closed secret equals another")
	}
}

// TestUnreachableSecretsAreReleased makes many secrets and closes none. The garbage
// collector gives their mappings back.
func TestUnreachableSecretsAreReleased(t *testing.T) {
	count := func() int {
		maps, err := os.ReadFile("/proc/self/maps")
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(maps), "\n")
	}
	before := count()
	for range 200 {
		if _, err := (Memory{}).New(32); err != nil {
			t.Fatal(err)
		}
	}
	for range 1000 {
		runtime.GC()
		if count() < before+50 {
			return
		}
	}
	t.Errorf("%d mappings before, %d after", before, count())
}

func TestClusterID(t *testing.T) {
	const s = "00112233445566778899aabbccddeeff"
	c, err := ParseClusterID(s)
	if err != nil || c.String() != s {
		t.Fatalf("%v, %v", c, err)
	}
	for _, bad := range []string{"", s[1:], s + "0", strings.ToUpper(s), "zz" + s[2:]} {
		if _, err := ParseClusterID(bad); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}

func TestErrorEndsInHint(t *testing.T) {
	err := fmt.Errorf("unlock: %w", Errorf(CauseEpoch, "run kleidi recover", "slot is of epoch %d", 3))
	if got := err.Error(); got != "unlock: slot is of epoch 3; run kleidi recover" {
		t.Error(got)
	}
	if CauseOf(err) != CauseEpoch || CauseOf(os.ErrNotExist) != "" {
		t.Error("CauseOf")
	}
}
