package doctor

import (
	"github.com/beezy-dev/kleidi/internal/doctor/credential"
	"github.com/beezy-dev/kleidi/internal/doctor/diagnosis"
)

// token judges what a PKCS#11 token reports about its user PIN.
func token(n *Node) []diagnosis.Finding {
	switch {
	case n.Token.Value != nil:
		return n.Token.Value.Judge()
	case n.Token.Why != "":
		return diagnosis.NotChecked("the PIN of the token: %s", n.Token.Why)
	}
	return nil
}

// vault judges the credentials with which kleidi logs in to Vault.
func vault(n *Node) []diagnosis.Finding {
	v := n.Config.Vault
	file, judge := v.Auth.TokenFile, credential.JWT
	switch {
	case v.Address == "":
		return nil
	case file != "" && n.VaultToken.Value != nil:
		return n.VaultToken.Value.Judge(file, credential.Vault{Address: v.Address, Namespace: v.Namespace, ServerName: v.ServerName, CAFile: v.CAFile}.Renew(file), n.Now)
	case file != "" && n.VaultToken.Why != "":
		return diagnosis.NotChecked("when the token in %s ends: %s", file, n.VaultToken.Why)
	case v.Auth.SecretIDFile != "":
		return diagnosis.NotChecked("when the secret ID in %s ends: Vault tells that only to those who may manage the role", v.Auth.SecretIDFile)
	case v.Auth.JWTFile != "":
		file = v.Auth.JWTFile
	case v.Auth.CertFile != "":
		file, judge = v.Auth.CertFile, credential.Certificate
	default:
		return nil
	}
	b, err := n.read(file)
	if err != nil {
		return diagnosis.NotChecked("%v", err)
	}
	defer clear(b)
	return judge(file, b, n.Now)
}
