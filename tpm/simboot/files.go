package simboot

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/beezy-dev/kleidi/tpm/simboot/peimage"
)

// Files are the files that a machine reads and measures when it boots. They have the
// form that firmware, boot loaders and kleidi reseal --next-… expect, and do not run.
// Files that the boot's loader does not read are nil.
type Files struct {
	// UKI is the unified kernel image, signed if the machine has keys.
	UKI []byte
	// Kernel and Initrd are the files that GRUB or the firmware loads.
	Kernel, Initrd []byte
	// GRUBConfig is the grub.cfg.
	GRUBConfig []byte
	// Dbx is the content of the dbx variable; nil without one.
	Dbx []byte
	// DbxUpdate is a signed update that leads to Dbx. Its signature is empty, because
	// nothing here verifies it.
	DbxUpdate []byte
}

// The names that [Files.Write] gives.
const (
	UKIName        = "uki.efi"
	KernelName     = "vmlinuz"
	InitrdName     = "initrd.img"
	GRUBConfigName = "grub.cfg"
	DbxName        = "dbx.esl"
	DbxUpdateName  = "dbxupdate.bin"
)

// Write writes the files into a folder, and removes the files of another boot from it.
func (f *Files) Write(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for name, b := range map[string][]byte{UKIName: f.UKI, KernelName: f.Kernel, InitrdName: f.Initrd,
		GRUBConfigName: f.GRUBConfig, DbxName: f.Dbx, DbxUpdateName: f.DbxUpdate} {
		path := filepath.Join(dir, name)
		if b != nil {
			if err := writeFile(path, b); err != nil {
				return err
			}
		} else if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// osRelease and sbat are sections of every UKI.
const (
	osRelease = "ID=debian\nVERSION_ID=\"13\"\nPRETTY_NAME=\"Debian GNU/Linux 13 (trixie)\"\n"
	sbat      = "sbat,1,SBAT Version,sbat,1,https://github.com/rhboot/shim/blob/main/SBAT.md\n"
)

// Files returns the files of the boot. They follow from b alone.
func (b Boot) Files() (*Files, error) {
	f := &Files{Dbx: b.dbx()}
	if f.Dbx != nil {
		f.DbxUpdate = signedUpdate(f.Dbx)
	}
	initrd := newc(file{"etc/initrd", []byte(b.Initrd)})
	kernel := peimage.Kernel(b.Kernel, "kernel "+b.Kernel)
	var err error
	switch b.Loader {
	case UKI:
		f.UKI, err = b.sign(peimage.UKI(b.LoaderVersion, b.sections(kernel, initrd)...), b.dbKey())
	case GRUB:
		f.Kernel, err = b.sign(kernel, vendorKey)
		f.Initrd, f.GRUBConfig = initrd, b.grubConfig()
	default:
		f.Kernel, err = b.sign(kernel, b.dbKey())
		f.Initrd = initrd
	}
	return f, err
}

// sections are the sections of the UKI, in ukify's order.
func (b Boot) sections(kernel, initrd []byte) []peimage.Section {
	s := []peimage.Section{{Name: ".osrel", Content: []byte(osRelease)}}
	if b.CommandLine != "" {
		s = append(s, peimage.Section{Name: ".cmdline", Content: []byte(b.CommandLine)})
	}
	return append(s,
		peimage.Section{Name: ".uname", Content: []byte(b.Kernel)},
		peimage.Section{Name: ".sbat", Content: []byte(sbat)},
		peimage.Section{Name: ".initrd", Content: initrd},
		peimage.Section{Name: ".linux", Content: kernel})
}

// vendorKey names the owner of the certificate inside shim.
const vendorKey = "Example Secure Boot CA"

func (b Boot) dbKey() string { return b.Keys + " Signature Database Key" }

// sign signs an image; on a machine without keys, images are not signed.
func (b Boot) sign(image []byte, by string) ([]byte, error) {
	if b.Keys == "" {
		return image, nil
	}
	s, err := signer(by)
	if err != nil {
		return nil, err
	}
	return s.Sign(image)
}

// signers caches signers, because checking their key takes 15 ms.
var signers sync.Map

func signer(name string) (*peimage.Signer, error) {
	if s, ok := signers.Load(name); ok {
		return s.(*peimage.Signer), nil
	}
	s, err := peimage.FixedSigner(name)
	if err != nil {
		return nil, fmt.Errorf("certificate %q: %w", name, err)
	}
	signers.Store(name, s)
	return s, nil
}

// dbx is the content of the variable: a list of hashes, and one more list for each
// further revision, since the firmware appends an update.
func (b Boot) dbx() []byte {
	if b.Dbx == "" {
		return nil
	}
	owner, none := ownerGUID("dbx"), sha256.Sum256(nil)
	var lists []byte
	for i, revision := range strings.Split(b.Dbx, ",") {
		sum := sha256.Sum256([]byte(revision))
		entries := [][]byte{none[:], sum[:]}
		if i > 0 {
			entries = entries[1:]
		}
		lists = append(lists, signatureList(guidSHA256, owner, entries...)...)
	}
	return lists
}

// signedUpdate returns an EFI_VARIABLE_AUTHENTICATION_2 (UEFI 2.10, 8.2.2).
func signedUpdate(content []byte) []byte {
	b := make([]byte, 16) // EFI_TIME
	b = binary.LittleEndian.AppendUint32(b, 24)
	b = append(b, 0x00, 0x02, 0xf1, 0x0e) // WIN_CERT_REVISION_2_0, WIN_CERT_TYPE_EFI_GUID
	b = append(b, guidPKCS7[:]...)
	return append(b, content...)
}

// grubConfig is a grub.cfg with one way to boot.
func (b Boot) grubConfig() []byte {
	return fmt.Appendf(nil, "set timeout=0\nlinux %s\ninitrd %s\nboot\n",
		quoted(b.linux()), quoted([]string{b.initrdFile()}))
}

func (b Boot) initrdFile() string { return "/boot/initrd.img-" + b.Kernel }

// linux returns the words of GRUB's linux command.
func (b Boot) linux() []string {
	return append([]string{"/boot/vmlinuz-" + b.Kernel}, strings.Fields(b.CommandLine)...)
}

// quoted writes words in GRUB's language.
func quoted(words []string) string {
	var out []string
	for _, w := range words {
		if strings.ContainsAny(w, "'\"\\$#;|&{}<> ") {
			w = "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
		}
		out = append(out, w)
	}
	return strings.Join(out, " ")
}

// file is a file in an archive.
type file struct {
	name    string
	content []byte
}

// newc returns a cpio archive in the form that Linux reads as its initrd
// (Documentation/driver-api/early-userspace/buffer-format.rst), without owners and
// times.
func newc(files ...file) []byte {
	var b []byte
	entry := func(inode, mode, links int, f file) {
		b = fmt.Appendf(b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
			inode, mode, 0, 0, links, 0, len(f.content), 0, 0, 0, 0, len(f.name)+1, 0, f.name)
		b = append(b, make([]byte, -len(b)&3)...)
		b = append(b, f.content...)
		b = append(b, make([]byte, -len(b)&3)...)
	}
	for i, f := range files {
		mode := 0o100444
		if f.content == nil {
			mode = 0o40555
		}
		entry(i+1, mode, 1, f)
	}
	entry(0, 0, 1, file{name: "TRAILER!!!"})
	// systemd writes only this length in capitals (src/boot/cpio.c)
	at := bytes.LastIndex(b, []byte("TRAILER!!!"))
	copy(b[at-16:], "0000000B")
	return b
}

// writeFile replaces a file in one step.
func writeFile(path string, b []byte) error {
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}
