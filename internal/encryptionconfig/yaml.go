package encryptionconfig

import (
	"encoding/json"
	"fmt"
	"regexp"
	"strings"
)

// YAML returns the configuration as a file with comments.
func (e EncryptionConfiguration) YAML() string {
	var b strings.Builder
	fmt.Fprintf(&b, "apiVersion: %s\nkind: %s\nresources:\n", e.APIVersion, e.Kind)
	for _, r := range e.Resources {
		if r.Own() {
			b.WriteString("  # the cluster store, which kleidi must be able to read before it can decrypt;\n  # kube-apiserver takes the first entry that fits, so keep this one first\n")
		}
		b.WriteString("  - resources:\n")
		for _, name := range r.Resources {
			if strings.HasPrefix(name, "*") && resourceName.MatchString(name) {
				name = "'" + name + "'" // otherwise YAML reads an alias
			} else {
				name = scalar(name)
			}
			fmt.Fprintf(&b, "      - %s\n", name)
		}
		b.WriteString("    providers:\n")
		for i, p := range r.Providers {
			if i > 0 && p.Identity != nil {
				b.WriteString("      # reads what was stored before encryption was switched on; remove it once\n      # all stored objects are rewritten\n")
			}
			p.writeYAML(&b)
		}
	}
	return b.String()
}

func (p Provider) writeYAML(b *strings.Builder) {
	switch kms := p.KMS; {
	case p.Identity != nil:
		b.WriteString("      - identity: {}\n")
	case kms == nil:
		fmt.Fprintf(b, "      - %s:\n          keys:\n", p.Kind())
		for _, k := range p.keys().Keys {
			fmt.Fprintf(b, "            - name: %s\n              secret: %s\n", scalar(k.Name), scalar(string(k.Secret)))
		}
	default:
		b.WriteString("      - kms:\n")
		for _, field := range [][2]string{{"apiVersion", kms.APIVersion}, {"name", kms.Name}, {"endpoint", kms.Endpoint}, {"timeout", kms.Timeout}} {
			if field[1] != "" {
				fmt.Fprintf(b, "          %s: %s\n", field[0], scalar(field[1]))
			}
		}
		if kms.CacheSize != nil {
			fmt.Fprintf(b, "          cachesize: %d\n", *kms.CacheSize)
		}
	}
}

// plain matches texts that YAML reads as strings without quotes.
var plain = regexp.MustCompile(`^([a-zA-Z][-a-zA-Z0-9]*(://)?)?[-a-zA-Z0-9/._]*[/._a-zA-Z][-a-zA-Z0-9/._]*$`)

// scalar returns s in YAML.
func scalar(s string) string {
	switch strings.ToLower(s) {
	case "null", "true", "false", "yes", "no", "on", "off", "y", "n":
	default:
		if plain.MatchString(s) && s[0] != '-' && s[0] != '.' && (s[0] < '0' || s[0] > '9' || isDuration(s)) {
			return s
		}
	}
	b, _ := json.Marshal(s) // JSON is YAML
	return string(b)
}

// isDuration reports whether s is a timeout such as 3s, which no YAML parser reads as a
// number.
func isDuration(s string) bool { return duration.MatchString(s) }

var duration = regexp.MustCompile(`^[0-9]+(ms|s|m|h)$`)
