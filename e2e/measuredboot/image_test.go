package measuredboot

import (
	"bytes"
	"crypto/sha256"
	"debug/pe"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/beezy-dev/kleidi/e2e/measuredboot/guest/disk"
	"github.com/beezy-dev/kleidi/e2e/measuredboot/guest/wire"
)

// image is the content of a machine's EFI system partition.
type image struct {
	loader      string // "uki" or "grub"
	commandLine string // added to the command line that all images share
	initrd      string // the content of a file in the initrd
	kernel      string // replaces the name of the kernel's builder, at the same length
	uname       string // .uname, which the stub does not measure
	unsigned    bool
	systemd     bool              // the initrd hands over to systemd
	network     bool              // the initrd loads the network card's driver
	sections    map[string][]byte // further sections of a unified kernel image
}

// Without no_timer_check the kernel panics on a busy host: it takes an emulated timer
// that ticks late for a broken one.
const commandLine = "console=ttyS0,115200 quiet panic=-1 no_timer_check root=tools"

const osRelease = "ID=measuredboot\nVERSION_ID=1\n"

// forge makes images in a folder, each image once.
type forge struct {
	dir   string
	parts *parts
	// init is the initrd's init; tools is the archive with the programs, and system the
	// archive that also contains systemd.
	init, tools, system []byte
	// key is the key whose certificate the firmware's db and KEK hold.
	key  string
	mu   sync.Mutex
	made map[string]string
}

func newForge(dir string) (*forge, error) {
	p, err := findParts()
	if err != nil {
		return nil, err
	}
	f := &forge{dir: dir, parts: p, key: filepath.Join(dir, "signing.key"), made: map[string]string{}}
	if _, err := output("openssl", "rsa", "-in", snakeoil+".key", "-passin", "pass:snakeoil", "-out", f.key); err != nil {
		return nil, err
	}
	kleidi, err := os.ReadFile(kleidiBinary())
	if err != nil {
		return nil, fmt.Errorf("%w; run make build, or set KLEIDI to the binary's path", err)
	}
	driver, err := f.program("driver")
	if err != nil {
		return nil, err
	}
	if f.init, err = f.program("init"); err != nil {
		return nil, err
	}
	programs := []disk.File{{Name: wire.Driver, Mode: 0o755, Data: driver}, {Name: wire.Kleidi, Mode: 0o755, Data: kleidi}}
	if f.tools, err = archive(programs); err != nil {
		return nil, err
	}
	system, err := p.systemFiles()
	if err != nil {
		return nil, err
	}
	f.system, err = archive(append(system, programs...))
	return f, err
}

func archive(files []disk.File) ([]byte, error) {
	var b bytes.Buffer
	err := disk.Pack(&b, files)
	return b.Bytes(), err
}

// root returns the archive that the initrd hands over to.
func (f *forge) root(i image) []byte {
	if i.systemd {
		return f.system
	}
	return f.tools
}

func kleidiBinary() string {
	if path := os.Getenv("KLEIDI"); path != "" {
		return path
	}
	return "../../bin/kleidi"
}

// program builds one of the guest's programs.
func (f *forge) program(name string) ([]byte, error) {
	path := filepath.Join(f.dir, name)
	_, err := output("env", "CGO_ENABLED=0", "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", path, "./guest/"+name)
	if err != nil {
		return nil, err
	}
	return os.ReadFile(path)
}

// path names a file that belongs to this image.
func (i image) path(f *forge, suffix string) string {
	return filepath.Join(f.dir, fmt.Sprintf("%x%s", sha256.Sum256(fmt.Appendf(nil, "%q", fmt.Sprintf("%+v", i))), suffix))
}

// once returns the file that make makes, and calls make only once.
func (f *forge) once(path string, make func(path string) error) (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.made[path]; ok {
		return path, nil
	}
	if err := make(path); err != nil {
		return "", err
	}
	f.made[path] = path
	return path, nil
}

// kernelFile returns the kernel, or a kernel of another builder.
func (f *forge) kernelFile(i image) (string, error) {
	if i.kernel == "" {
		return f.parts.kernel, nil
	}
	return f.once(i.path(f, ".kernel"), func(path string) error {
		b, err := os.ReadFile(f.parts.kernel)
		if err != nil {
			return err
		}
		builder := []byte("debian-kernel@lists.debian.org")
		if !bytes.Contains(b, builder) || len(i.kernel) > len(builder) {
			return fmt.Errorf("%s does not name its builder %s", f.parts.kernel, builder)
		}
		other := slices.Concat([]byte(i.kernel), bytes.Repeat([]byte(" "), len(builder)-len(i.kernel)))
		return os.WriteFile(path, bytes.Replace(b, builder, other, 1), 0o600)
	})
}

// uki makes the unified kernel image, signed unless i says otherwise.
func (f *forge) uki(i image) (string, error) {
	kernel, err := f.kernelFile(i)
	if err != nil {
		return "", err
	}
	initrd, err := f.initrdFile(i)
	if err != nil {
		return "", err
	}
	return f.once(i.path(f, ".efi"), func(path string) error {
		sections := []section{{".osrel", f.text(path, ".osrel", osRelease)}}
		sections = append(sections, section{".cmdline", f.text(path, ".cmdline", i.line())})
		uname := i.uname
		if uname == "" {
			uname = "measuredboot"
		}
		sections = append(sections, section{".uname", f.text(path, ".uname", uname)})
		for _, name := range slices.Sorted(maps.Keys(i.sections)) {
			sections = append(sections, section{name, f.text(path, name, string(i.sections[name]))})
		}
		sections = append(sections, section{".initrd", initrd}, section{".linux", kernel})
		if err := addSections(f.parts.stub, path, sections); err != nil || i.unsigned {
			return err
		}
		return f.sign(path)
	})
}

func (i image) line() string {
	if i.commandLine == "" {
		return commandLine
	}
	return commandLine + " " + i.commandLine
}

func (i image) grubConfig() string {
	return fmt.Sprintf("set timeout=0\nlinux /vmlinuz %s\ninitrd /initrd\nboot\n", i.line())
}

// text writes the content of a section. A file that can't be written shows when it is
// read.
func (f *forge) text(base, name, content string) string {
	path := base + name
	_ = os.WriteFile(path, []byte(content), 0o600)
	return path
}

type section struct{ name, file string }

// addSections places sections after those of the stub: fixed addresses would overlap
// with big kernels.
func addSections(stub, out string, sections []section) error {
	f, err := pe.Open(stub)
	if err != nil {
		return err
	}
	defer f.Close()
	header, ok := f.OptionalHeader.(*pe.OptionalHeader64)
	if !ok {
		return fmt.Errorf("%s is no 64-bit PE file", stub)
	}
	align := func(n uint64) uint64 { return (n + 0xffff) &^ 0xffff }
	var at uint64
	for _, s := range f.Sections {
		at = max(at, align(uint64(s.VirtualAddress+max(s.VirtualSize, s.Size))))
	}
	// -p: without it the time of day is in the PE header, and PCR 4 would change with
	// each build
	args := []string{"-p"}
	for _, s := range sections {
		info, err := os.Stat(s.file)
		if err != nil {
			return err
		}
		args = append(args, "--add-section", s.name+"="+s.file, "--change-section-vma", fmt.Sprintf("%s=%#x", s.name, header.ImageBase+at))
		at = align(at + uint64(info.Size()))
	}
	_, err = output("objcopy", append(args, stub, out)...)
	return err
}

const (
	ovmf      = "/usr/share/OVMF/"
	snakeoil  = "/usr/share/ovmf/PkKek-1-snakeoil"
	codeImage = ovmf + "OVMF_CODE_4M.secboot.fd"
)

func (f *forge) sign(path string) error {
	_, err := output("sbsign", "--key", f.key, "--cert", snakeoil+".pem", "--output", path, path)
	return err
}

// disk makes the image's disk.
func (f *forge) disk(i image) (string, error) {
	type copied struct{ from, to string }
	var files []copied
	switch i.loader {
	case "uki":
		uki, err := f.uki(i)
		if err != nil {
			return "", err
		}
		files = []copied{{uki, "EFI/BOOT/BOOTX64.EFI"}}
	case "grub":
		initrd, err := f.initrdFile(i)
		if err != nil {
			return "", err
		}
		files = []copied{{f.parts.shim, "EFI/BOOT/BOOTX64.EFI"}, {f.parts.grub, "EFI/BOOT/grubx64.efi"},
			{f.parts.kernel, "vmlinuz"}, {initrd, "initrd"}}
	default:
		return "", fmt.Errorf("no loader %q", i.loader)
	}
	return f.once(i.path(f, ".img"), func(path string) error {
		if i.loader == "grub" {
			files = append(files, copied{f.text(path, ".grub.cfg", i.grubConfig()), "EFI/debian/grub.cfg"})
		}
		if err := makePartition(path); err != nil {
			return err
		}
		for _, c := range files {
			if _, err := output("mcopy", "-i", path+"@@1M", c.from, "::/"+c.to); err != nil {
				return err
			}
		}
		return nil
	})
}
