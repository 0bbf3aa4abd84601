package sealtest

import (
	"encoding/base64"
	"encoding/hex"
	"strings"
	"testing"
)

// TestFindSecret: FindSecret finds a secret at every position of an encoded text.
func TestFindSecret(t *testing.T) {
	secret := []byte("a secret of many bytes\xff\xfe")
	for before := range 4 {
		text := append([]byte("xyzw"[:before]), append(secret, "after"...)...)
		for want, shown := range map[string][]string{
			"raw": {string(text)}, "hexadecimal": {hex.EncodeToString(text), strings.ToUpper(hex.EncodeToString(text))},
			"base64": {base64.StdEncoding.EncodeToString(text), base64.RawURLEncoding.EncodeToString(text)},
		} {
			for _, s := range shown {
				if got := FindSecret(s, secret); got != want {
					t.Errorf("%d bytes before it: %q, want %q", before, got, want)
				}
			}
		}
	}
	if got := FindSecret("nothing", secret); got != "" {
		t.Errorf("found %q", got)
	}
}
