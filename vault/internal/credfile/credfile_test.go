package credfile

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/beezy-dev/kleidi/seal"
)

func TestCredentialFiles(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "credential")
	for name, row := range map[string]struct {
		content string
		mode    os.FileMode
		allowed Readers
		says    string
	}{
		"sound":                {"abc\n", 0o600, OwnerOnly, ""},
		"read-only":            {"abc", 0o400, OwnerOnly, ""},
		"projected":            {"abc", 0o644, Anyone, ""},
		"readable to a group":  {"abc", 0o640, OwnerOnly, "mode 0640 lets others read it"},
		"writable to others":   {"abc", 0o602, OwnerOnly, "mode 0602"},
		"empty":                {"", 0o600, OwnerOnly, "it is empty"},
		"an empty line":        {"\n", 0o600, OwnerOnly, "not one line"},
		"two lines":            {"abc\ndef\n", 0o600, OwnerOnly, "not one line"},
		"a header within":      {"abc\r\nX: y", 0o600, OwnerOnly, "not one line"},
		"no ASCII":             {"abc\xc3\xa9", 0o600, OwnerOnly, "not one line"},
		"as large as may be":   {strings.Repeat("a", MaxCredential), 0o600, OwnerOnly, ""},
		"larger than may be":   {strings.Repeat("a", MaxCredential+1), 0o600, OwnerOnly, "at most 16384"},
		"a secret is withheld": {"hunter2 hunter2", 0o600, OwnerOnly, "not one line"},
	} {
		t.Run(name, func(t *testing.T) {
			_ = os.Remove(file)
			if err := os.WriteFile(file, []byte(row.content), row.mode); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(file, row.mode); err != nil {
				t.Fatal(err)
			}
			err := With("auth.tokenFile", file, row.allowed, func(b []byte) error {
				if string(b) != strings.TrimSpace(row.content) {
					t.Errorf("read %q", b)
				}
				return nil
			})
			if row.says == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			checkError(t, err, nil, "vault.auth.tokenFile", file, row.says)
			if strings.Contains(err.Error(), "hunter2") {
				t.Errorf("the error holds the credential: %v", err)
			}
		})
	}
}

// TestFilesThatOthersMayReplace: public data must be the operator's too, since a CA decides
// whom kleidi speaks to.
func TestFilesThatOthersMayReplace(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "open")
	if err := errors.Join(os.Mkdir(dir, 0o700), os.WriteFile(filepath.Join(dir, "ca.pem"), []byte("x"), 0o600)); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		path string
		mode os.FileMode
		says string
	}{
		{filepath.Join(dir, "ca.pem"), 0o664, "has mode 0664, so others can change it; chmod go-w "},
		{dir, 0o777, "has mode 0777, so others can replace what is below it; chmod go-w "},
	} {
		info, err := os.Stat(c.path)
		if err == nil {
			err = os.Chmod(c.path, c.mode)
		}
		if err != nil {
			t.Fatal(err)
		}
		_, err = Roots(filepath.Join(dir, "ca.pem"))
		checkError(t, err, nil, "vault.caFile", c.path, c.says)
		if err := os.Chmod(c.path, info.Mode()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Roots(filepath.Join(dir, "ca.pem")); !errors.Is(err, ErrNoCertificate) {
		t.Errorf("nobody else may write it: %v", err)
	}
}

func TestCredentialIsNoFile(t *testing.T) {
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{fifo, t.TempDir(), "/dev/zero", "/nowhere/at/all"} {
		err := With("auth.tokenFile", path, OwnerOnly, func([]byte) error { return nil })
		checkError(t, err, nil, path)
	}
}

func TestCAFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, []byte("no PEM"), 0o644); err != nil {
		t.Fatal(err)
	}
	_, err := Roots(file)
	checkError(t, err, ErrNoCertificate, "vault.caFile", file)
}

// checkError demands an error about the credentials that has a hint and these texts. If is
// is not nil, the error must also match it.
func checkError(t *testing.T, err error, is error, says ...string) {
	t.Helper()
	if _, hint := seal.SplitHint(err); seal.CauseOf(err) != seal.CauseCredentials || hint == "" || is != nil && !errors.Is(err, is) {
		t.Errorf("%v: cause %q, hint %q; want %q, %v", err, seal.CauseOf(err), hint, seal.CauseCredentials, is)
	}
	for _, text := range says {
		if err == nil || !strings.Contains(err.Error(), text) {
			t.Errorf("%v does not say %q", err, text)
		}
	}
}
