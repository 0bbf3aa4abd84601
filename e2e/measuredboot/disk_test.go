package measuredboot

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"github.com/beezy-dev/kleidi/e2e/measuredboot/guest/disk"
	"github.com/beezy-dev/kleidi/e2e/measuredboot/guest/wire"
)

// Sizes of a disk and of its only partition, in sectors of 512 bytes: the minimum for
// FAT32. The identifiers are fixed, because the firmware measures them.
const (
	diskSize  = 66 << 20
	partition = "label: gpt\nlabel-id: 11111111-2222-3333-4444-555555555555\nfirst-lba: 2048\n" +
		"start=2048, size=131072, type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B, uuid=AAAAAAAA-BBBB-CCCC-DDDD-EEEEEEEEEEEE, name=ESP\n"
)

// makePartition makes a disk with an empty EFI system partition.
func makePartition(path string) error {
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return err
	}
	if err := os.Truncate(path, diskSize); err != nil {
		return err
	}
	cmd := exec.Command("sfdisk", "-q", path)
	cmd.Env = append(os.Environ(), "PATH="+os.Getenv("PATH")+":/sbin:/usr/sbin")
	cmd.Stdin = strings.NewReader(partition)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("sfdisk: %w: %s", err, out)
	}
	at := path + "@@1M"
	if _, err := output("mformat", "-i", at, "-F", "-T", "131072", "-h", "16", "-s", "63", "-N", "12345678", "-v", "ESP", "::"); err != nil {
		return err
	}
	_, err := output("mmd", "-i", at, "::/EFI", "::/EFI/BOOT", "::/EFI/debian")
	return err
}

// initrdFile packs the initrd: init, the modules in load order, and the digest of the
// disk with the programs.
func (f *forge) initrdFile(i image) (string, error) {
	root := f.root(i)
	return f.once(image{initrd: i.initrd, systemd: i.systemd, network: i.network}.path(f, ".initrd"), func(path string) error {
		files := []disk.File{{Name: "modules/", Mode: 0o755}, {Name: "init", Mode: 0o755, Data: f.init}}
		files = append(files, disk.File{Name: wire.ToolsDigest[1:], Mode: 0o644, Data: fmt.Appendf(nil, "%x %d\n", sha256.Sum256(root), len(root))})
		if i.initrd != "" {
			files = append(files, disk.File{Name: "hook", Mode: 0o755, Data: []byte(i.initrd)})
		}
		loaded := map[string]bool{}
		var err error
		modules := []string{"virtio_pci", "virtio_blk", "efivarfs"}
		if i.network {
			modules = append(modules, "virtio_net")
		}
		for _, name := range modules {
			if files, err = f.addModule(files, name, loaded); err != nil {
				return err
			}
		}
		var packed bytes.Buffer
		z, err := gzip.NewWriterLevel(&packed, gzip.BestCompression)
		if err != nil {
			return err
		}
		if _, err := z.Write(cpio(files)); err != nil {
			return err
		}
		if err := z.Close(); err != nil {
			return err
		}
		return os.WriteFile(path, packed.Bytes(), 0o600)
	})
}

func (f *forge) addModule(files []disk.File, name string, loaded map[string]bool) ([]disk.File, error) {
	module, err := f.parts.module(name)
	if err != nil || module == nil || loaded[name] {
		return files, err
	}
	loaded[name] = true
	needs, err := dependencies(module)
	if err != nil {
		return nil, fmt.Errorf("module %s: %w", name, err)
	}
	for _, n := range needs {
		if files, err = f.addModule(files, n, loaded); err != nil {
			return nil, err
		}
	}
	return append(files, disk.File{Name: fmt.Sprintf("modules/%02d-%s.ko", len(files), name), Mode: 0o644, Data: module}), nil
}

// cpio packs files in the "newc" format. The same files always give the same bytes.
func cpio(files []disk.File) []byte {
	var b bytes.Buffer
	pad := func() {
		for b.Len()%4 != 0 {
			b.WriteByte(0)
		}
	}
	entry := func(inode int, name string, mode int64, data []byte) {
		fmt.Fprintf(&b, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X", inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0)
		b.WriteString(name + "\x00")
		pad()
		b.Write(data)
		pad()
	}
	const regular, folder = 0o100000, 0o040000
	for i, f := range files {
		if name, ok := strings.CutSuffix(f.Name, "/"); ok {
			entry(i+1, name, folder|f.Mode, nil)
			continue
		}
		entry(i+1, f.Name, regular|f.Mode, f.Data)
	}
	entry(0, "TRAILER!!!", 0, nil)
	return b.Bytes()
}
