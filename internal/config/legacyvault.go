package config

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"go.yaml.in/yaml/v3"
)

// legacyVault is the Vault configuration of kleidi 1.x. Its first versions had other
// names, and the address in path. Settings that 1.x read from the environment, such as
// the CA and the client certificate, are not in the file.
type legacyVault struct {
	Address, Namespace, TransitPath, TransitKey, VaultRole, AuthMethod, AuthPath string
	Path, Transit, Role                                                          string
}

// vaultSection is the section vault of the configuration, as far as the file of kleidi
// 1.x determines it.
type vaultSection struct {
	Vault struct {
		Address   string `yaml:"address"`
		CAFile    string `yaml:"caFile"`
		Namespace string `yaml:"namespace,omitempty"`
		Mount     string `yaml:"mount,omitempty"`
		Key       string `yaml:"key"`
		Auth      struct {
			Method   string `yaml:"method"`
			Mount    string `yaml:"mount,omitempty"`
			Role     string `yaml:"role,omitempty"`
			CertFile string `yaml:"certFile,omitempty"`
			KeyFile  string `yaml:"keyFile,omitempty"`
		} `yaml:"auth"`
	} `yaml:"vault"`
}

// LegacyVault tells the operator how to write the Vault configuration of kleidi 1.x in
// the present form. init stops there, because the operator must name the CA and the files
// of a client certificate.
func LegacyVault(path string, b []byte) error {
	var old legacyVault
	if err := json.Unmarshal(b, &old); err != nil {
		return errors.New("it is not a JSON object of strings")
	}
	section, open := old.section()
	text, err := yaml.Marshal(section)
	if err != nil {
		return err
	}
	fill := ""
	if len(open) > 0 {
		fill = ", with " + strings.Join(open, ", and ")
	}
	return fmt.Errorf("--import-config %s: this is kleidi 1.x's Vault configuration; add this section to the configuration%s; then run kleidi init without --import-config, and kleidi slot add vault (see docs/vault.md):\n\n%s",
		path, fill, strings.TrimSuffix(string(text), "\n"))
}

// section translates the settings, and lists those that the operator must fill in.
func (old legacyVault) section() (s vaultSection, open []string) {
	v := &s.Vault
	v.Address, v.CAFile, v.Namespace, v.Mount, v.Key = cmp.Or(old.Address, old.Path), "CA_FILE", old.Namespace, strings.Trim(old.TransitPath, "/"), cmp.Or(old.TransitKey, old.Transit, "KEY")
	open = append(open, "files in the place of the words in capitals")
	if host, ok := strings.CutPrefix(v.Address, "http://"); ok {
		v.Address = "https://" + host
		open = append(open, "the address at which the server speaks TLS, which kleidi demands")
	}
	if v.Address == "" {
		v.Address = "https://HOST:8200"
	}
	a := &v.Auth
	a.Mount, a.Role = strings.TrimPrefix(strings.Trim(old.AuthPath, "/"), "auth/"), cmp.Or(old.VaultRole, old.Role)
	switch old.AuthMethod {
	case "", "k8s", "kubernetes":
		a.Method = "kubernetes"
	case "cert":
		a.Method, a.CertFile, a.KeyFile = "cert", "CERTIFICATE_FILE", "KEY_FILE"
	default:
		a.Method = "METHOD"
		open = append(open, fmt.Sprintf("a login of docs/vault.md in the place of %.40q", old.AuthMethod))
	}
	return s, open
}
