package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/verifierd"
)

const (
	unitFile     = "../../deploy/kleidi.service"
	tmpfilesFile = "../../deploy/tmpfiles.d/kleidi.conf"
)

// unit returns the settings of the unit's [Service], each with its values in order.
func unit(t testing.TB) map[string][]string { return settingsOf(t, unitFile) }

func settingsOf(t testing.TB, file string) map[string][]string {
	return sectionOf(t, file, "Service")
}

// sectionOf returns the settings of one section of a unit, each with its values in order.
func sectionOf(t testing.TB, file, name string) map[string][]string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(b), "\n["+name+"]\n")
	section, _, _ = strings.Cut(section, "\n[")
	settings := map[string][]string{}
	for line := range strings.Lines(section) {
		name, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		if ok && !strings.HasPrefix(name, "#") {
			settings[name] = append(settings[name], value)
		}
	}
	return settings
}

// confinement returns a command that runs another one with the capabilities of the unit.
// CAP_IPC_LOCK stands for an infinite LimitMEMLOCK=: to the kernel, either means that any
// amount may be locked, and a container often may not raise limits.
func confinement(t testing.TB) []string {
	t.Helper()
	u := unit(t)
	if len(u["CapabilityBoundingSet"]) != 1 {
		t.Fatalf("%s does not bound the capabilities, once: %q", unitFile, u["CapabilityBoundingSet"])
	}
	caps := "-all"
	for _, name := range strings.Fields(u["CapabilityBoundingSet"][0]) {
		caps += ",+" + strings.ToLower(strings.TrimPrefix(name, "CAP_"))
	}
	if slices.Equal(u["LimitMEMLOCK"], []string{"infinity"}) {
		caps += ",+ipc_lock"
	}
	return []string{"setpriv", "--bounding-set=" + caps, "--inh-caps=-all", "--no-new-privs", "--"}
}

// TestUnit checks the unit against the needs of the code and the promises of the
// documents; the script unit.txtar runs serve with its capabilities.
func TestUnit(t *testing.T) {
	u := unit(t)
	for name, want := range map[string][]string{
		"Type": {"notify"},
		// A laden machine or a slow TPM must not end a good serve. A dump of the stacks
		// could hold parts of a key.
		"WatchdogSec":           {"5min"},
		"WatchdogSignal":        {"SIGKILL"},
		"ExecStart":             {"/usr/local/bin/kleidi serve"},
		"ExecReload":            {"/bin/sh -c 'kill -HUP $MAINPID'"},
		"CapabilityBoundingSet": {"CAP_DAC_OVERRIDE CAP_CHOWN"},
		"AmbientCapabilities":   {""},
		"NoNewPrivileges":       {"yes"},
		"DevicePolicy":          {"closed"},
		// A TPM's resource manager has the major number of char-tpm. The first TPM
		// itself has that of misc.
		"DeviceAllow":  {"/dev/tpmrm0 rw", "/dev/tpm0 rw", "char-tpm rw"},
		"LimitMEMLOCK": {"infinity"},
		"LimitCORE":    {"0"},
		// It would take the sockets' folder away from a kube-apiserver that mounted it.
		"RuntimeDirectory": nil,
		// kleidi makes its folder and files with the modes that they need.
		"UMask": {"0077"},
		"User":  nil, "DynamicUser": nil, "PrivateDevices": nil, "PrivateUsers": nil,
	} {
		if !slices.Equal(u[name], want) {
			t.Errorf("%s: %s is %q, not %q", unitFile, name, u[name], want)
		}
	}
	if p := u["ProtectSystem"]; !slices.Equal(p, []string{"strict"}) {
		t.Fatalf("%s: ProtectSystem is %q", unitFile, p)
	}
}

// TestUnitLeavesTheFoldersWritable: the folders of the default configuration, which
// tmpfiles.d makes, stay writable.
func TestUnitLeavesTheFoldersWritable(t *testing.T) {
	b, err := os.ReadFile(tmpfilesFile)
	if err != nil {
		t.Fatal(err)
	}
	made := map[string]bool{}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "d" {
			made[f[1]] = true
		}
	}
	var writable []string
	for _, paths := range unit(t)["ReadWritePaths"] {
		writable = append(writable, strings.Fields(paths)...)
	}
	c := config.Default()
	for _, dir := range []string{c.State.Dir, filepath.Dir(c.KMS.Socket), filepath.Dir(c.Admin.Socket)} {
		if !slices.Contains(writable, dir) {
			t.Errorf("%s: ReadWritePaths= lacks %s", unitFile, dir)
		}
		if !made[dir] {
			t.Errorf("%s does not make %s", tmpfilesFile, dir)
		}
	}
}

// TestVerifierUnit: the verifier's unit names the files and the folders of the code, and
// asks for no capability.
func TestVerifierUnit(t *testing.T) {
	u := settingsOf(t, "../../deploy/kleidi-verifier.service")
	for name, want := range map[string]string{
		"ExecStart":             "/usr/local/bin/kleidi --config " + verifierd.DefaultPath + " verifier",
		"RuntimeDirectory":      filepath.Base(filepath.Dir(verifierd.DefaultSocket)),
		"ReadWritePaths":        "-" + filepath.Dir(verifierd.DefaultPath),
		"CapabilityBoundingSet": "CAP_CHOWN", // for http.socketGID
		"NoNewPrivileges":       "yes",
		"Type":                  "notify",
		"LimitCORE":             "0",
	} {
		if !slices.Equal(u[name], []string{want}) {
			t.Errorf("%s=%q, want %q", name, u[name], want)
		}
	}
	if len(u["ExecReload"]) == 0 {
		t.Error("systemctl reload does nothing")
	}
}
