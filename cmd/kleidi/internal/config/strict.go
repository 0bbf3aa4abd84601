package config

import (
	"encoding"
	"fmt"
	"net"
	"path/filepath"
	"reflect"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/nv"
)

// problems collects what is wrong, each with the path of its key.
type problems struct{ list []error }

func (p *problems) add(path, format string, args ...any) {
	p.list = append(p.list, fmt.Errorf("  "+path+": "+format, args...))
}

// decode fills c from a document. yaml.v3's own strict mode stops counting at the
// first type error of a mapping and names no paths.
func (p *problems) decode(doc *yaml.Node, c *Config) {
	if len(doc.Content) == 0 {
		p.add("file", "it is empty; want apiVersion: %s and kind: %s", APIVersion, Kind)
		return
	}
	p.mapping(doc.Content[0], reflect.ValueOf(c).Elem(), "")
}

func (p *problems) mapping(n *yaml.Node, v reflect.Value, path string) {
	if n.Kind != yaml.MappingNode {
		p.add(strings.TrimSuffix(path, "."), "line %d: want keys with values", n.Line)
		return
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		field, ok := fieldOf(v, key.Value)
		switch {
		case !ok:
			p.add(path+key.Value, "line %d: unknown key", key.Line)
		case seen[key.Value]:
			p.add(path+key.Value, "line %d: the key stands twice", key.Line)
		default:
			p.value(value, field, path+key.Value)
		}
		seen[key.Value] = true
	}
}

func (p *problems) value(n *yaml.Node, field reflect.Value, path string) {
	_, text := field.Addr().Interface().(encoding.TextUnmarshaler)
	if field.Kind() == reflect.Struct && !text {
		p.mapping(n, field, path+".")
		return
	}
	if n.Kind == yaml.AliasNode || n.Tag == "!!null" {
		p.add(path, "line %d: want a value of its own", n.Line)
		return
	}
	if err := n.Decode(field.Addr().Interface()); err != nil {
		p.add(path, "line %d: want %s, not %q", n.Line, kindName(field), n.Value)
	}
}

func kindName(v reflect.Value) string {
	switch v.Interface().(type) {
	case FileMode:
		return `permission bits in octal ("0660")`
	}
	switch v.Type().String() {
	case "time.Duration":
		return "a duration (30s)"
	case "slog.Level":
		return "debug, info, warn or error"
	}
	switch v.Kind() {
	case reflect.String:
		return "a string"
	case reflect.Slice:
		return "a list of numbers"
	default:
		return "a number in range"
	}
}

func fieldOf(v reflect.Value, key string) (reflect.Value, bool) {
	for i := range v.NumField() {
		if v.Type().Field(i).Tag.Get("yaml") == key {
			return v.Field(i), true
		}
	}
	return reflect.Value{}, false
}

func (p *problems) validate(c *Config) {
	p.oneOf("apiVersion", c.APIVersion, APIVersion)
	p.oneOf("kind", c.Kind, Kind)
	p.oneOf("tpm.bank", c.TPM.Bank, "sha256", "sha384")
	p.oneOf("memory.lock", c.Memory.Lock, LockRequired, LockBestEffort)
	p.oneOf("log.format", c.Log.Format, "text", "json")
	p.absolute("state.dir", c.State.Dir)
	p.absolute("kms.socket", c.KMS.Socket)
	p.absolute("admin.socket", c.Admin.Socket)
	p.absolute("tpm.eventLog", c.TPM.EventLog)
	p.absolute("tpm.userspaceEventLog", c.TPM.UserspaceEventLog)
	if c.TPM.OwnerAuthFile != "" {
		p.absolute("tpm.ownerAuthFile", c.TPM.OwnerAuthFile)
	}
	p.validateTPM(&c.TPM)
	if c.KMS.Name == "" || strings.ContainsAny(c.KMS.Name, ": \n") {
		p.add("kms.name", "%q can't stand in a stored object's prefix; want a name without colons and spaces", c.KMS.Name)
	}
	p.validateHTTP(c.HTTP.Address)
}

func (p *problems) validateTPM(c *TPM) {
	if _, err := tpm.ParseAddress(c.Device); err != nil {
		p.add("tpm.device", "%v", err)
	}
	if c.Timeout <= 0 {
		p.add("tpm.timeout", "want more than 0")
	}
	for _, i := range c.PCRs {
		if i < 0 || i > 15 {
			p.add("tpm.pcrs", "PCR %d does not exist or can be reset without a reboot; want 0 to 15", i)
		}
	}
	if _, err := nv.NewCounter(c.EpochIndex, tpm.Owner{}); err != nil {
		p.add("tpm.epochIndex", "%v", err)
	}
}

// validateHTTP keeps health and metrics on the machine: they are not authenticated.
func (p *problems) validateHTTP(address string) {
	if address == "" {
		return
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		p.add("http.address", "%v", err)
	} else if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		p.add("http.address", "%q is not on loopback; health and metrics are not authenticated", address)
	}
}

func (p *problems) absolute(path, value string) {
	if !filepath.IsAbs(value) {
		p.add(path, "%q is not an absolute path", value)
	}
}

func (p *problems) oneOf(path, value string, allowed ...string) {
	if !slices.Contains(allowed, value) {
		p.add(path, "%q; want %s", value, strings.Join(allowed, " or "))
	}
}
