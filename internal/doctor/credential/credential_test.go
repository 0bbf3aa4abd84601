package credential

import (
	"strings"
	"testing"
	"time"
)

var now = time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)

// TestEnding: what lives for long ends soon within two weeks, and what lives for an hour within
// its last sixth.
func TestEnding(t *testing.T) {
	const day = 24 * time.Hour
	for _, c := range []struct {
		left, lives time.Duration
		want        bool
	}{
		{13 * day, 365 * day, true}, {15 * day, 365 * day, false},
		{9 * time.Minute, time.Hour, true}, {11 * time.Minute, time.Hour, false},
		{-time.Second, 0, true}, {time.Second, 0, false},
	} {
		if got := Ending(now, now.Add(c.left), c.lives); got != c.want {
			t.Errorf("%v left of %v: %v", c.left, c.lives, got)
		}
	}
}

// TestUnreadable: a token whose claims can't be read is no finding, and the check is not made.
func TestUnreadable(t *testing.T) {
	for _, token := range []string{"a.!.c", "a.e30=.c", "a.eyJleHAiOiJ4In0.c"} {
		if got := JWT("/jwt", []byte(token), now); len(got) != 1 || got[0].ID != "" {
			t.Errorf("%s: %+v", token, got)
		}
	}
	if got := JWT("/jwt", []byte("e30.e30.c2ln\n"), now); got != nil {
		t.Errorf("a token without an end: %+v", got)
	}
}

// TestRenew: each part is one word to a shell.
func TestRenew(t *testing.T) {
	v := Vault{Address: "https://vault:8200", CAFile: "/etc/our ca.pem"}
	if got := v.Renew("/etc/token"); got != `VAULT_ADDR=https://vault:8200 VAULT_CACERT='/etc/our ca.pem' VAULT_TOKEN="$(cat /etc/token)" vault token renew` {
		t.Error(got)
	}
	v.Namespace, v.ServerName = "team a", "vault.example"
	if got := v.Renew("/etc/token"); !strings.Contains(got, ` VAULT_NAMESPACE='team a' VAULT_TLS_SERVER_NAME=vault.example VAULT_CACERT=`) {
		t.Error(got)
	}
}
