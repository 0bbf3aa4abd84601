package config

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
)

const (
	referenceFile = "../../docs/configuration.md"
	exampleFile   = "../../deploy/config.yaml"
)

// settings returns the path of every key with its default.
func settings(v reflect.Value, path string) map[string]reflect.Value {
	out := map[string]reflect.Value{}
	for i := range v.NumField() {
		name := path + v.Type().Field(i).Tag.Get("yaml")
		if v.Field(i).Kind() == reflect.Struct {
			for k, d := range settings(v.Field(i), name+".") {
				out[k] = d
			}
			continue
		}
		out[name] = v.Field(i)
	}
	return out
}

// shown returns a default in the form of the reference.
func shown(key string, v reflect.Value) string {
	switch key {
	case "apiVersion", "kind":
		return "–"
	case "node":
		return "host name"
	case "kms.allowedUIDs":
		return "root and the socket's owner"
	case "unlock.selfTest":
		return "`" + strings.TrimSuffix(fmt.Sprint(v.Interface()), "0m0s") + "`"
	case "tpm.epochIndex", "anchor.index":
		return fmt.Sprintf("`0x%08X`", v.Uint())
	case "kms.socketMode", "http.socketMode":
		return fmt.Sprintf("`%04o`", v.Uint())
	}
	switch {
	case v.Kind() == reflect.Slice && v.Len() == 0, v.Kind() == reflect.String && v.Len() == 0:
		return "empty"
	case key == "log.level":
		return "`" + strings.ToLower(fmt.Sprint(v.Interface())) + "`"
	default:
		return fmt.Sprintf("`%v`", v.Interface())
	}
}

var referenceRow = regexp.MustCompile("(?m)^\\| `([^`]+)` \\| ([^|]+) \\| ([^|]+) \\| ([^|]+) \\|$")

func TestReferenceNamesEveryKeyWithItsDefault(t *testing.T) {
	b, err := os.ReadFile(referenceFile)
	if err != nil {
		t.Fatal(err)
	}
	all := settings(reflect.ValueOf(Default()).Elem(), "")
	seen := map[string]bool{}
	for _, row := range referenceRow.FindAllStringSubmatch(string(b), -1) {
		key, given := row[1], row[3]
		v, ok := all[key]
		if !ok {
			t.Errorf("%s: %s is no key", referenceFile, key)
			continue
		}
		if want := shown(key, v); given != want {
			t.Errorf("%s: the default of %s is %s, not %s", referenceFile, key, want, given)
		}
		seen[key] = true
	}
	for key := range all {
		if !seen[key] {
			t.Errorf("%s has no row for %s", referenceFile, key)
		}
	}
}

func TestExampleHoldsEveryDefault(t *testing.T) {
	b, err := os.ReadFile(exampleFile)
	if err != nil {
		t.Fatal(err)
	}
	c, err := Parse(b)
	if err != nil {
		t.Fatalf("%s:\n%v", exampleFile, err)
	}
	want, err := Default().resolve()
	if err != nil {
		t.Fatal(err)
	}
	want.TPM.PCRs = []int{}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("%s is not the default:\n%+v\n%+v", exampleFile, c, want)
	}
	for key := range settings(reflect.ValueOf(want).Elem(), "") {
		name := key[strings.LastIndexByte(key, '.')+1:]
		if !regexp.MustCompile(`(?m)^ *(# )?` + name + `:`).Match(b) {
			t.Errorf("%s does not show %s", exampleFile, key)
		}
	}
}

// TestKindConfigurations: kleidi takes the configurations for kind's clusters.
func TestKindConfigurations(t *testing.T) {
	files, err := filepath.Glob("../../deploy/kind/*/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("files %v, error %v", files, err)
	}
	parsed := 0
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(b), "\nkind: KleidiConfiguration\n") {
			continue // kind's or Kubernetes'
		}
		if _, err := Parse(b); err != nil {
			t.Errorf("%s:\n%v", file, err)
		}
		parsed++
	}
	if parsed < 4 {
		t.Errorf("%d configurations", parsed)
	}
}
