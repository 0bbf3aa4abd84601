package config

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/kmsplugin"
	"github.com/beezy-dev/kleidi/grpcserver/verifier"
	"github.com/beezy-dev/kleidi/hsm"
	"github.com/beezy-dev/kleidi/internal/strictyaml"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/bootrule"
	"github.com/beezy-dev/kleidi/tpm/device"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/nv"
	"github.com/beezy-dev/kleidi/vault"
)

// problems extends the problems of the document with those of its values.
type problems struct{ strictyaml.Problems }

func (p *problems) validate(c *Config) {
	p.oneOf("apiVersion", c.APIVersion, APIVersion)
	p.oneOf("kind", c.Kind, Kind)
	p.oneOf("tpm.bank", c.TPM.Bank, "sha256", "sha384")
	p.oneOf("tpm.phase", c.TPM.Phase, "enter-initrd", "leave-initrd", "sysinit", "ready")
	p.oneOf("anchor.store", c.Anchor.Store, AnchorFile, AnchorTPM)
	p.oneOf("memory.lock", c.Memory.Lock, LockRequired, LockBestEffort)
	p.oneOf("log.format", c.Log.Format, "text", "json")
	p.absolute("state.dir", c.State.Dir)
	p.absolute("kms.socket", c.KMS.Socket)
	p.absolute("admin.socket", c.Admin.Socket)
	p.absolute("tpm.eventLog", c.TPM.EventLog)
	p.absolute("tpm.userspaceEventLog", c.TPM.UserspaceEventLog)
	for key, path := range map[string]string{"tpm.ownerAuthFile": c.TPM.OwnerAuthFile, "tpm.bootPolicy": c.TPM.BootPolicy} {
		if path != "" {
			p.absolute(key, path)
		}
	}
	for _, path := range c.TPM.BootStates {
		p.absolute("tpm.bootStates", path)
	}
	if c.KMS.Socket == c.Admin.Socket {
		p.Add("admin.socket", "%q is kms.socket too; name another path", c.Admin.Socket)
	}
	p.validateTPM(&c.TPM)
	p.validateVerifier(&c.TPM)
	p.validateUnlock(c)
	p.validateAnchor(c)
	if c.KMS.Name == "" || strings.ContainsAny(c.KMS.Name, ": \n") {
		p.Add("kms.name", "%q can't stand in a stored object's prefix; want a name without colons and spaces", c.KMS.Name)
	}
	if c.KMS.AllowedUIDs != nil && len(c.KMS.AllowedUIDs) == 0 {
		p.Add("kms.allowedUIDs", "the list is empty, so nobody could call; leave the key out for root and the socket's owner")
	}
	c.HTTP.Validate(&p.Problems)
	p.validateJoin(c)
	if c.Cluster.Kubeconfig != "" {
		p.absolute("cluster.kubeconfig", c.Cluster.Kubeconfig)
	}
	if s := c.HTTP.Socket; s != "" && (s == c.KMS.Socket || s == c.Admin.Socket) {
		p.Add("http.socket", "%q is another socket too; name another path", s)
	}
}

// imaPCR belongs to Linux's IMA: a slot sealed to it would open only until the next
// measurement.
const imaPCR = 10

func (p *problems) validatePCRs(key string, pcrs []int) {
	for _, i := range pcrs {
		if i == imaPCR {
			p.Add(key, "IMA extends PCR %d for as long as the machine runs; leave it out", i)
		}
		if i < 0 || i > 15 {
			p.Add(key, "PCR %d does not exist or can be reset without a reboot; want 0 to 15", i)
		}
	}
}

func (p *problems) validateUnlock(c *Config) {
	configured := map[string]bool{seal.TypeTPM: true, seal.TypePKCS11: c.PKCS11.Configured(), seal.TypeVault: c.Vault.Address != "", seal.TypeKMSPlugin: c.KMSPlugin.Socket != ""}
	key := map[string]string{seal.TypePKCS11: "pkcs11.module", seal.TypeVault: "vault.address", seal.TypeKMSPlugin: "kmsPlugin.socket"}
	pairs := map[string]string{seal.TypeTPMAndPKCS11: seal.TypePKCS11, seal.TypeTPMAndVault: seal.TypeVault, seal.TypeTPMAndKMSPlugin: seal.TypeKMSPlugin}
	for pair, second := range pairs {
		configured[pair], key[pair] = configured[second], key[second]
	}
	if len(c.Unlock.Order) > 1 && slices.ContainsFunc(c.Unlock.Order, func(w string) bool { return pairs[w] != "" }) {
		p.Add("unlock.order", "a two-of-two stands alone: any other wrapper beside it would open the keyring without it")
	}
	seen := map[string]bool{}
	for i, w := range c.Unlock.Order {
		there, known := configured[w]
		switch path := fmt.Sprintf("unlock.order[%d]", i); {
		case !known:
			p.Add(path, "%q; want tpm, pkcs11, vault, kms-plugin, tpm-and-pkcs11, tpm-and-vault or tpm-and-kms-plugin", w)
		case seen[w]:
			p.Add(path, "%s appears twice", w)
		case !there:
			p.Add(path, "%s is not configured; set %s", w, key[w])
		}
		seen[w] = true
	}
	if len(c.Unlock.Order) == 0 {
		p.Add("unlock.order", "the list is empty, so nothing could open the keyring; leave the key out for tpm")
	}
	if c.Unlock.SelfTest < 0 || c.Unlock.SelfTest > 0 && c.Unlock.SelfTest < time.Minute {
		p.Add("unlock.selfTest", "want 1m or more, or 0s for never")
	}
	if configured[seal.TypePKCS11] {
		p.validatePKCS11(c.PKCS11)
	}
	if configured[seal.TypeVault] {
		p.validateVault(c.Vault)
	}
	if configured[seal.TypeKMSPlugin] {
		if _, err := kmsplugin.New(c.KMSPlugin.Wrapper(seal.Memory{})); err != nil {
			p.Add("kmsPlugin", "%v", err)
		}
	}
}

func (p *problems) validatePKCS11(c PKCS11) {
	unused := func(context.Context) (*seal.Secret, error) { return nil, errors.ErrUnsupported }
	if _, err := hsm.New(c.Wrapper(seal.Memory{}, unused)); err != nil {
		p.Add("pkcs11", "%v", err)
	}
	if c.SealedPINFile != "" {
		p.absolute("pkcs11.sealedPINFile", c.SealedPINFile)
	}
}

func (p *problems) validateVault(c Vault) {
	unused := func(context.Context) (*tls.Certificate, error) { return nil, errors.ErrUnsupported }
	if _, err := vault.New(c.Wrapper(seal.Memory{}, unused)); err != nil {
		p.Add("vault", "%v", err)
	}
	a := c.Auth
	if a.TPMKeyFile == "" {
		return
	}
	p.absolute("vault.auth.tpmKeyFile", a.TPMKeyFile)
	p.absolute("vault.auth.certFile", a.CertFile)
	if a.KeyFile != "" {
		p.Add("vault.auth.tpmKeyFile", "vault.auth.keyFile names a key as well; remove one of them")
	}
	if method := vault.Method(a.Method); method != vault.MethodCert {
		p.Add("vault.auth.tpmKeyFile", "the method %s doesn't use it; remove it", method)
	}
}

func (p *problems) validateVerifier(c *TPM) {
	v := c.Verifier
	for key, path := range map[string]string{"tpm.verifier.caFile": v.CAFile, "tpm.verifier.publicKey": v.PublicKey} {
		if path != "" {
			p.absolute(key, path)
		}
	}
	if v.Address == "" {
		return
	}
	if v.Timeout <= 0 || v.Timeout >= c.Timeout {
		p.Add("tpm.verifier.timeout", "want more than 0, and less than tpm.timeout, %v", c.Timeout)
	}
	if v.PublicKey == "" {
		p.Add("tpm.verifier.publicKey", "want the file with the verifier's public key, as kleidi verifier init prints it")
	}
	if _, err := verifier.NewClient(verifier.ClientConfig{Address: v.Address, Certificate: v.Certificate, CAFile: v.CAFile, ServerName: v.ServerName}); err != nil {
		p.Add("tpm.verifier", "%v", err)
	}
}

func (p *problems) validateAnchor(c *Config) {
	p.validatePCRs("anchor.pcrs", c.Anchor.PCRs)
	if len(c.Anchor.PCRs) == 0 {
		p.Add("anchor.pcrs", "the list is empty, so that any boot could write the anchor; leave the key out for PCR 7")
	} else if err := bootrule.Possible(c.Anchor.PCRs, bootrule.SignedBoot); err != nil {
		p.Add("anchor.pcrs", "%v; leave the key out for PCR 7", err)
	}
	if _, err := nv.NewAnchor(c.Anchor.Index, keys.Owner{}); err != nil {
		p.Add("anchor.index", "%v", err)
	}
	if c.Anchor.Store == AnchorTPM && c.Anchor.Index == c.TPM.EpochIndex {
		p.Add("anchor.index", "%#08x is tpm.epochIndex too; name another index", c.Anchor.Index)
	}
}

func (p *problems) validateTPM(c *TPM) {
	if _, err := device.ParseAddress(c.Device); err != nil {
		p.Add("tpm.device", "%v", err)
	}
	if c.Timeout <= 0 {
		p.Add("tpm.timeout", "want more than 0")
	}
	p.validatePCRs("tpm.pcrs", c.PCRs)
	p.validateBinding(c)
	if _, err := nv.NewCounter(c.EpochIndex, keys.Owner{}); err != nil {
		p.Add("tpm.epochIndex", "%v", err)
	}
}

// validateBinding refuses PCRs that measure no boot, whatever the machine.
func (p *problems) validateBinding(c *TPM) {
	demand, hint := bootrule.WholeBoot, "leave the key out"
	switch {
	case len(c.PCRs) == 0:
		return
	case c.AnySignedBoot:
		demand = bootrule.SignedBoot
	case slices.Contains(c.PCRs, 7):
		hint += ", add PCR 4, or accept that with tpm.anySignedBoot: true"
	}
	if err := bootrule.Possible(c.PCRs, demand); err != nil {
		p.Add("tpm.pcrs", "%v; %s", err, hint)
	}
}

// Validate keeps health and metrics on the machine: they are not authenticated.
func (c HTTP) Validate(p *strictyaml.Problems) {
	if c.Socket != "" && !filepath.IsAbs(c.Socket) {
		p.Add("http.socket", "%q is not an absolute path", c.Socket)
	}
	address := c.Address
	if address == "" {
		return
	}
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		p.Add("http.address", "%v; want 127.0.0.1:9779 for instance", err)
	} else if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		p.Add("http.address", "port %q; want 1 to 65535", port)
	} else if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		p.Add("http.address", "%q is not on loopback; health and metrics are not authenticated", address)
	}
}

// validateJoin demands addresses with a port, and an address that another machine can
// reach.
func (p *problems) validateJoin(c *Config) {
	if c.Audit.File != "" {
		p.absolute("audit.file", c.Audit.File)
	}
	for key, address := range map[string]string{"join.listen": c.Join.Listen, "join.advertise": c.Join.Advertise} {
		if address == "" {
			continue
		}
		if _, port, err := net.SplitHostPort(address); err != nil {
			p.Add(key, "%v; want 192.0.2.1:9780 for instance", err)
		} else if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			p.Add(key, "port %q; want 1 to 65535", port)
		}
	}
	if c.Join.Advertise != "" && c.Join.Listen == "" {
		p.Add("join.advertise", "join.listen is empty, so nobody answers there; set it, or remove join.advertise")
	}
}

func (p *problems) absolute(path, value string) {
	if !filepath.IsAbs(value) {
		p.Add(path, "%q is not an absolute path", value)
	}
}

func (p *problems) oneOf(path, value string, allowed ...string) {
	if !slices.Contains(allowed, value) {
		p.Add(path, "%q; want %s", value, strings.Join(allowed, " or "))
	}
}
