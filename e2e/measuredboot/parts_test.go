package measuredboot

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
)

// parts is the folder with the unpacked packages that the machines boot from.
type parts struct {
	kernel, stub, shim, grub string
	system                   string            // a root folder with systemd
	modules                  map[string]string // path by name
	versions                 map[string]string // version by package
}

var findParts = sync.OnceValues(func() (*parts, error) {
	out, err := output("./parts")
	if err != nil {
		return nil, err
	}
	dir := strings.TrimSpace(out)
	p := &parts{
		stub:     filepath.Join(dir, "usr/lib/systemd/boot/efi/linuxx64.efi.stub"),
		shim:     filepath.Join(dir, "usr/lib/shim/shimx64.efi.signed"),
		grub:     filepath.Join(dir, "usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed"),
		modules:  map[string]string{},
		versions: map[string]string{},
		system:   filepath.Join(dir, "system"),
	}
	kernels, err := filepath.Glob(filepath.Join(dir, "boot/vmlinuz-*"))
	if err != nil || len(kernels) != 1 {
		return nil, fmt.Errorf("%s/boot has %d kernels: %w", dir, len(kernels), err)
	}
	p.kernel = kernels[0]
	versions, err := os.ReadFile(filepath.Join(dir, "versions"))
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(versions)) {
		name, version, _ := strings.Cut(strings.TrimSpace(line), " ")
		p.versions[name] = version
	}
	return p, p.findModules(dir)
})

func (p *parts) findModules(dir string) error {
	return filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		for _, suffix := range []string{".ko", ".ko.xz"} {
			if name, ok := strings.CutSuffix(filepath.Base(path), suffix); ok {
				p.modules[strings.ReplaceAll(name, "-", "_")] = path
			}
		}
		return err
	})
}

// module returns a kernel module, unpacked, or nil if it is built in.
func (p *parts) module(name string) ([]byte, error) {
	path, ok := p.modules[strings.ReplaceAll(name, "-", "_")]
	if !ok {
		return nil, nil
	}
	if strings.HasSuffix(path, ".xz") {
		out, err := output("xz", "-dc", path)
		return []byte(out), err
	}
	return os.ReadFile(path)
}

// dependencies returns the modules that a module needs.
func dependencies(module []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(module))
	if err != nil {
		return nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("a kernel module without .modinfo")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	for _, field := range strings.Split(string(info), "\x00") {
		if names, ok := strings.CutPrefix(field, "depends="); ok && names != "" {
			return strings.Split(names, ","), nil
		}
	}
	return nil, nil
}

// output runs a program and returns its output.
func output(name string, args ...string) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.Command(name, args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", fmt.Errorf("%s: %w\n%s%s", strings.Join(cmd.Args, " "), err, stdout.Bytes(), stderr.Bytes())
	}
	return stdout.String(), nil
}

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}
