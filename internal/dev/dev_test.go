package dev

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/tpm/simboot"
)

// TestResolve: the flags change the loader's ordinary boot, and leave the rest of it
// unchanged.
func TestResolve(t *testing.T) {
	t.Setenv("XDG_STATE_HOME", "")
	t.Setenv("HOME", "/home/someone")
	flags := simboot.Baseline(simboot.UKI)
	flags.Kernel, flags.SecureBoot = "6.99", false
	for name, row := range map[string]struct {
		state      string // XDG_STATE_HOME
		dir        string
		loader     simboot.Loader
		given      bool // --secure-boot
		secureBoot bool
		want       string
	}{
		"home":           {"", "", simboot.UKI, false, simboot.Baseline(simboot.UKI).SecureBoot, "/home/someone/.local/state/kleidi/dev"},
		"XDG":            {"/state", "", simboot.GRUB, false, simboot.Baseline(simboot.GRUB).SecureBoot, "/state/kleidi/dev"},
		"named":          {"/state", "/tmp/x/../dev", simboot.UKI, false, simboot.Baseline(simboot.UKI).SecureBoot, "/tmp/dev"},
		"no secure boot": {"/state", "/tmp/dev", simboot.UKI, true, false, "/tmp/dev"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("XDG_STATE_HOME", row.state)
			d := &Dev{Dir: row.dir, Boot: flags}
			if err := d.Resolve(row.loader, row.given); err != nil {
				t.Fatal(err)
			}
			if d.Dir != row.want || d.Boot.Loader != row.loader || d.Boot.Kernel != "6.99" || d.Boot.SecureBoot != row.secureBoot {
				t.Errorf("%s, %+v", d.Dir, d.Boot)
			}
		})
	}
	if err := (&Dev{Dir: t.TempDir()}).Resolve("floppy", false); err == nil {
		t.Error("an unknown loader is accepted")
	}
	t.Setenv("HOME", "")
	if err := (&Dev{Boot: flags}).Resolve(simboot.UKI, false); err == nil || !strings.Contains(err.Error(), "name a folder with --dir") {
		t.Errorf("without a home: %v", err)
	}
}

// TestCommand: a printed command begins with the name kleidi only if a shell finds this
// kleidi by it.
func TestCommand(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	bin, other := t.TempDir(), t.TempDir()
	if err := errors.Join(os.Symlink(self, filepath.Join(bin, "kleidi")), os.WriteFile(filepath.Join(other, "kleidi"), []byte("#!/bin/sh\n"), 0o700)); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{bin: "kleidi", other: self, t.TempDir(): self, other + ":" + bin: self} {
		t.Setenv("PATH", path)
		if got := command(); got != want {
			t.Errorf("PATH=%s: %s, want %s", path, got, want)
		}
	}
}

// TestConfig: every other command can read the written configuration, and all of its
// paths are in the machine's folder.
func TestConfig(t *testing.T) {
	d := &Dev{Dir: t.TempDir(), Load: func(path string) (*config.Config, error) { return config.Load(path) }}
	m, err := simboot.New(d.path("machine"))
	if err != nil {
		t.Fatal(err)
	}
	c, err := d.config(m)
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{c.State.Dir, c.KMS.Socket, c.Admin.Socket} {
		if filepath.Dir(path) != d.Dir {
			t.Errorf("%s is not in %s", path, d.Dir)
		}
	}
	if c.HTTP.Socket != "" || c.Node != "dev" {
		t.Errorf("%+v", c)
	}
	info, err := os.Stat(d.path("config.yaml"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if onOff(true) != "on" || onOff(false) != "off" {
		t.Error("on and off")
	}
}
