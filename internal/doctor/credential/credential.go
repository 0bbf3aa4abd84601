// Package credential judges the credentials with which kleidi logs in to a token or to Vault:
// whether a login is about to be impossible, and what an operator then does. It asks nobody.
package credential

import (
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"strings"
	"time"

	"github.com/beezy-dev/kleidi/internal/doctor/diagnosis"
	"github.com/beezy-dev/kleidi/seal"
)

// Token is a PKCS#11 token's report about its user PIN.
type Token struct {
	// Module is the path of the PKCS#11 module that shows the token.
	Module, Label string
	// CountLow says that a wrong PIN was given since the last right one.
	Locked, FinalTry, CountLow bool
}

// Judge judges what the token reports.
func (t Token) Judge() []diagnosis.Finding {
	tool := "pkcs11-tool --module " + seal.Quote(t.Module) + " --token-label " + seal.Quote(t.Label) + " --login "
	const right = "--list-objects   # with the right PIN, which resets the count"
	switch {
	case t.Locked:
		return diagnosis.Found("token/pin-locked", tool+"--login-type so --init-pin   # asks for the security officer's PIN; then put the fresh PIN where kleidi reads it",
			"the user PIN of token %q is locked", t.Label)
	case t.FinalTry:
		return diagnosis.Found("token/pin-final-try", tool+right, "token %q reports that its user PIN has one try left", t.Label)
	case t.CountLow:
		return diagnosis.Found("token/pin-count-low", tool+right, "token %q reports a wrong user PIN since the last right one", t.Label)
	}
	return nil
}

// leastCertificate is the remaining lifetime below which a client certificate is a
// finding. kleidi asks for the next certificate a month before the end, so an
// administrator has had weeks to approve it.
const leastCertificate = 14 * 24 * time.Hour

// Ending reports whether something that lives this long ends so soon that its renewal, which
// comes earlier, has failed.
func Ending(now, ends time.Time, lives time.Duration) bool {
	return ends.Sub(now) < min(leastCertificate, lives/6)
}

// VaultToken is the server's report about a token.
type VaultToken struct {
	Invalid   bool
	Ends      time.Time // zero if it never ends
	Lives     time.Duration
	Renewable bool
	Uses      int // that are left, or 0 if they are not limited
}

// Judge judges the token in a file. renew is the command that renews it.
func (t VaultToken) Judge(file, renew string, now time.Time) []diagnosis.Finding {
	fresh := "kleidi slot test vault   # after a fresh token is in " + file
	switch {
	case t.Invalid:
		return diagnosis.Found("vault/token", fresh, "Vault refuses the token in %s: it is expired, revoked or of another server", file)
	case t.Uses > 0:
		return diagnosis.Found("vault/token", fresh+", without a limit of uses", "the token in %s ends after %s", file, seal.Count(t.Uses, "more use"))
	case t.Ends.IsZero() || !Ending(now, t.Ends, t.Lives):
		return nil
	case !t.Renewable:
		return diagnosis.Found("vault/token", fresh, "the token in %s ends at %s, and can't be renewed", file, t.Ends.UTC().Format(time.RFC3339))
	}
	return diagnosis.Found("vault/token", renew, "the token in %s ends at %s", file, t.Ends.UTC().Format(time.RFC3339))
}

// Vault is how kleidi reaches Vault; all but the address may be empty.
type Vault struct{ Address, Namespace, ServerName, CAFile string }

// Renew is the command that renews the token in a file. The token is in the environment,
// because other users can read the words of a command line.
func (v Vault) Renew(file string) string {
	command := "VAULT_ADDR=" + seal.Quote(v.Address)
	for _, setting := range [][2]string{{"VAULT_NAMESPACE", v.Namespace}, {"VAULT_TLS_SERVER_NAME", v.ServerName}, {"VAULT_CACERT", v.CAFile}} {
		if setting[1] != "" {
			command += " " + setting[0] + "=" + seal.Quote(setting[1])
		}
	}
	return command + " VAULT_TOKEN=\"$(cat " + seal.Quote(file) + ")\" vault token renew"
}

// JWT judges the times in a token of Kubernetes or of an identity provider, which a file
// holds. Nothing in it is verified here, as Vault does that.
func JWT(file string, b []byte, now time.Time) []diagnosis.Finding {
	parts := strings.Split(strings.TrimSpace(string(b)), ".")
	if len(parts) != 3 {
		return diagnosis.Found("vault/jwt", "ls -l "+seal.Quote(file)+"   # put a JSON Web Token there", "%s holds no JSON Web Token", file)
	}
	var times struct {
		Issued int64 `json:"iat"`
		Ends   int64 `json:"exp"`
	}
	claims, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err == nil {
		err = json.Unmarshal(claims, &times)
	}
	if err != nil {
		return diagnosis.NotChecked("when the token in %s ends: its claims can't be read", file)
	}
	ends, lives := time.Unix(times.Ends, 0), time.Duration(0)
	if times.Issued > 0 {
		lives = ends.Sub(time.Unix(times.Issued, 0))
	}
	if times.Ends == 0 || !Ending(now, ends, lives) {
		return nil
	}
	return diagnosis.Found("vault/jwt", "ls -l "+seal.Quote(file)+"   # see what renews this file, and why it did not; then kleidi slot test vault",
		"the token in %s ends at %s", file, ends.UTC().Format(time.RFC3339))
}

// Certificate judges the client certificate that a file holds.
func Certificate(file string, b []byte, now time.Time) []diagnosis.Finding {
	remedy := "kleidi slot test vault   # after a fresh certificate is in " + file
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "CERTIFICATE" {
		return diagnosis.Found("vault/certificate", remedy, "%s begins with no certificate in PEM", file)
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return diagnosis.Found("vault/certificate", remedy, "%s: %v", file, err)
	}
	if Ending(now, c.NotAfter, c.NotAfter.Sub(c.NotBefore)) {
		return diagnosis.Found("vault/certificate", remedy, "%s ends at %s", file, c.NotAfter.UTC().Format(time.RFC3339))
	}
	return nil
}
