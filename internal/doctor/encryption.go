package doctor

import (
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/beezy-dev/kleidi/internal/doctor/diagnosis"
	"github.com/beezy-dev/kleidi/internal/encryptionconfig"
)

// Bounds of the timeout of a call in an EncryptionConfiguration. kleidi answers from memory;
// kube-apiserver's own requests end after a minute.
const (
	leastTimeout = time.Second
	mostTimeout  = 30 * time.Second
)

func encryptionConfiguration(n *Node) []diagnosis.Finding {
	file := n.EncryptionConfig
	b, err := n.read(file)
	if os.IsNotExist(err) {
		return diagnosis.Found("encryption-configuration/missing", "kleidi encryption-config --file "+file, "there is no %s", file)
	}
	if os.IsPermission(err) {
		return diagnosis.NotChecked("%v", err)
	}
	var e *encryptionconfig.EncryptionConfiguration
	if err == nil {
		e, err = encryptionconfig.Parse(b)
	}
	if err != nil {
		return diagnosis.Found("encryption-configuration/refused", "kleidi encryption-config   # prints a good one", "%s: %v", file, err)
	}
	if !e.Encrypts(n.Config.KMS.Name) {
		return diagnosis.Found("encryption-configuration/not-first", "kleidi encryption-config   # put its provider first", "in %s kleidi's provider is first for no resource", file)
	}
	var all []diagnosis.Finding
	if e.EncryptsStore() {
		all = diagnosis.Found("encryption-configuration/store", "kleidi encryption-config   # with --resources '*.*' it prints the entry that must stand first", "%s encrypts the cluster store", file)
	}
	if st, err := os.Stat(n.path(file)); err == nil && st.Mode().Perm()&0o077 != 0 {
		all = append(all, diagnosis.Found("encryption-configuration/mode", "chmod 0600 "+file, "%s has mode %04o", file, st.Mode().Perm())...)
	}
	for _, r := range e.Resources {
		if r.Own() {
			continue
		}
		for i, p := range r.Providers {
			all = append(all, n.provider(p)...)
			if i > 0 && n.own(p.KMS) {
				all = append(all, diagnosis.Found("encryption-configuration/not-first", "kleidi encryption-config   # put its provider first", "in %s kleidi's provider %s is not the first for %s", file, p.KMS.Name, strings.Join(r.Resources, ", "))...)
			}
		}
	}
	return all
}

// own reports whether a plugin is kleidi's. Each entry of an EncryptionConfiguration needs
// another name, so the further ones are kleidi-2 and so on.
func (n *Node) own(p *encryptionconfig.KMS) bool {
	if p == nil {
		return false
	}
	suffix, numbered := strings.CutPrefix(p.Name, n.Config.KMS.Name+"-")
	_, err := strconv.Atoi(suffix)
	return p.Name == n.Config.KMS.Name || numbered && err == nil || p.Endpoint == "unix://"+n.Config.KMS.Socket
}

// provider judges one provider of the EncryptionConfiguration.
func (n *Node) provider(p encryptionconfig.Provider) (all []diagnosis.Finding) {
	file, c := n.EncryptionConfig, n.Config.KMS
	if p.Identity != nil {
		return diagnosis.Found("encryption-configuration/identity", "kleidi migrate   # then remove the provider identity", "%s still reads what is stored in the clear (identity)", file)
	}
	if !n.own(p.KMS) {
		return nil
	}
	if p.KMS.APIVersion != "v2" {
		all = diagnosis.Found("encryption-configuration/api-version", "kleidi encryption-config   # prints the line apiVersion: v2", "in %s kleidi's provider %s has apiVersion %q", file, p.KMS.Name, p.KMS.APIVersion)
	}
	if p.KMS.Endpoint != "unix://"+c.Socket {
		all = append(all, diagnosis.Found("encryption-configuration/endpoint", "kleidi encryption-config   # prints the endpoint", "%s names the socket %s for %s, and kleidi serves unix://%s", file, p.KMS.Endpoint, p.KMS.Name, c.Socket)...)
	}
	if d, err := time.ParseDuration(p.KMS.Timeout); p.KMS.Timeout != "" && (err != nil || d < leastTimeout || d > mostTimeout) {
		all = append(all, diagnosis.Found("encryption-configuration/timeout", "kleidi encryption-config   # prints the line timeout: 3s", "in %s kleidi's provider %s has the timeout %s", file, p.KMS.Name, p.KMS.Timeout)...)
	}
	return all
}
