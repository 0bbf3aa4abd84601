package carry

import (
	"strings"
	"testing"
)

// TestFile: a file is read as it was written, and in no other form.
func TestFile(t *testing.T) {
	b, err := File{Keyring: []byte("keyring"), Record: []byte("record")}.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	f, err := ParseFile(b)
	if err != nil || string(f.Keyring) != "keyring" || string(f.Record) != "record" {
		t.Errorf("%+v, %v", f, err)
	}
	whole := string(b)
	for name, row := range map[string]struct{ file, says string }{
		"nothing":       {"", "not a file that kleidi keyring export wrote"},
		"text":          {"keyring", "not a file that kleidi keyring export wrote"},
		"no format":     {`{"keyring":"","record":""}`, "not a file that kleidi keyring export wrote"},
		"a keyring":     {`{"format":2}`, "not a file that kleidi keyring export wrote"},
		"a member more": {strings.Replace(whole, "{", `{"module":"x",`, 1), "not a file that kleidi keyring export wrote"},
		"later format":  {strings.Replace(whole, `"kleidiExport":1`, `"kleidiExport":9`, 1), "format 9"},
		"twice":         {whole + whole, "follows the end"},
	} {
		if _, err := ParseFile([]byte(row.file)); err == nil || !strings.Contains(err.Error(), row.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
