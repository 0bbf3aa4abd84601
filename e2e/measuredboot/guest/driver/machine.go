package main

import (
	"encoding/hex"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport/linuxtpm"
	"golang.org/x/sys/unix"

	"github.com/beezy-dev/kleidi/e2e/measuredboot/guest/wire"
)

// network brings up lo, for kleidi's HTTP address, and the network card if there is one.
func network() error {
	if err := up("lo", nil); err != nil {
		return err
	}
	const card = "eth0"
	if _, err := os.Stat("/sys/class/net/" + card); os.IsNotExist(err) {
		return nil
	}
	return up(card, net.ParseIP(wire.Guest))
}

// up gives a network interface its address, if any, in a network of 256, and brings it up.
func up(name string, address net.IP) error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	if address != nil {
		for _, set := range []struct {
			request uint
			value   []byte
		}{{unix.SIOCSIFADDR, address.To4()}, {unix.SIOCSIFNETMASK, net.CIDRMask(24, 32)}} {
			if err := ifr.SetInet4Addr(set.value); err != nil {
				return err
			}
			if err := unix.IoctlIfreq(s, set.request, ifr); err != nil {
				return err
			}
		}
	}
	ifr.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, ifr)
}

// facts reads how this machine booted, from the kernel and not from kleidi.
func facts() (*wire.Facts, error) {
	f := &wire.Facts{PCRs: map[int]string{}}
	for path, into := range map[string]*string{"/proc/sys/kernel/osrelease": &f.Kernel, "/proc/cmdline": &f.CommandLine} {
		b, err := os.ReadFile(path)
		if err != nil {
			return nil, err
		}
		*into = strings.TrimSpace(string(b))
	}
	v, err := os.ReadFile(efivars + "/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c")
	if err != nil {
		return nil, err
	}
	f.SecureBoot = v[len(v)-1] == 1
	if f.EventLog, err = os.ReadFile("/sys/kernel/security/tpm0/binary_bios_measurements"); err != nil {
		return nil, err
	}
	return f, readPCRs(f.PCRs)
}

func readPCRs(into map[int]string) error {
	files, err := filepath.Glob("/sys/class/tpm/tpm0/pcr-sha256/*")
	if err != nil {
		return err
	}
	for _, file := range files {
		n, err := strconv.Atoi(filepath.Base(file))
		if err != nil {
			return err
		}
		b, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		value := strings.ToLower(strings.TrimSpace(string(b)))
		if _, err := hex.DecodeString(value); err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		into[n] = value
	}
	return nil
}

// copyFile copies a file, even into efivarfs, whose files the kernel protects from
// accidental writes.
func copyFile(from, to string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if f, err := os.Open(to); err == nil && filepath.Dir(to) == efivars {
		err = unix.IoctlSetPointerInt(int(f.Fd()), unix.FS_IOC_SETFLAGS, 0)
		f.Close()
		if err != nil {
			return fmt.Errorf("%s: make it mutable: %w", to, err)
		}
	}
	return os.WriteFile(to, b, 0o600)
}

const efivars = "/sys/firmware/efi/efivars"

// undefine removes an NV index, as any operating system on this machine can if the
// owner authorization is empty.
func undefine(index uint32) error {
	t, err := linuxtpm.Open("/dev/tpmrm0")
	if err != nil {
		return err
	}
	defer t.Close()
	public, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(index)}.Execute(t)
	if err != nil {
		return fmt.Errorf("TPM2_NV_ReadPublic: %w", err)
	}
	_, err = tpm2.NVUndefineSpace{
		AuthHandle: tpm2.TPMRHOwner,
		NVIndex:    tpm2.NamedHandle{Handle: tpm2.TPMHandle(index), Name: public.NVName},
	}.Execute(t)
	if err != nil {
		return fmt.Errorf("TPM2_NV_UndefineSpace: %w", err)
	}
	return nil
}
