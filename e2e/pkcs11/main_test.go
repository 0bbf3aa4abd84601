package pkcs11

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// binary is kleidi with PKCS#11. shim is the PKCS#11 module of hsm/testdata/module:
// SoftHSM's module, with faults. binaryOfPlugin is another KMS v2 plugin.
var binary, shim, binaryOfPlugin string

func TestMain(m *testing.M) {
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (int, error) {
	dir, err := os.MkdirTemp("", "kleidi-e2e-pkcs11-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	binary, shim = filepath.Join(dir, "kleidi"), filepath.Join(dir, "shim.so")
	for _, command := range [][]string{
		{"env", "CGO_ENABLED=1", "go", "build", "-o", binary, "../../cmd/kleidi"},
		{"cc", "-shared", "-fPIC", "-o", shim, "../../hsm/testdata/module/module.c", "-ldl"},
	} {
		if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
			return 0, fmt.Errorf("%q: %w\n%s", command, err, out)
		}
	}
	build := exec.Command("../servers/build", "pkcs11plugin")
	build.Stderr = os.Stderr
	path, err := build.Output()
	if err != nil {
		return 0, fmt.Errorf("e2e/servers/build: %w", err)
	}
	binaryOfPlugin = strings.TrimSpace(string(path))
	return m.Run(), nil
}
