package transitslot

import "testing"

func TestVersionOfCiphertext(t *testing.T) {
	for text, want := range map[string]int{
		"vault:v1:AAAA": 1, "vault:v2147483647:AA==": 2147483647, "vault:v0:AAAA": 0, "vault:v01:AAAA": 0, "vault:v+1:AAAA": 0,
		"vault:v2147483648:AAAA": 0, "vault:v1": 0, "vault:v1:": 0, "vault:v1:A A": 0, "vault:v1:A:A": 0, "vault:v1:\"": 0, "Vault:v1:AAAA": 0, "": 0,
	} {
		if got, err := Version(text); got != want || (err == nil) != (want > 0) {
			t.Errorf("%q: %d, %v; want %d", text, got, err, want)
		}
	}
}
