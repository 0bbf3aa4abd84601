package seal

import "testing"

func TestCount(t *testing.T) {
	for n, want := range map[int]string{0: "0 boot states", 1: "1 boot state", 2: "2 boot states"} {
		if got := Count(n, "boot state"); got != want {
			t.Errorf("%d: %q", n, got)
		}
	}
}
