package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/beezy-dev/kleidi/internal/usage/usagetest"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// snapshot writes the file of an etcd snapshot: snapshot FILE KEY=KEYID..., where the key
// ID "clear" stores in clear, and "current" and "retired" stand for those of the keyring.
func (h *host) snapshot(ts *testscript.TestScript, args []string) error {
	if len(args) < 2 {
		return broken("snapshot FILE KEY=KEYID...")
	}
	var roles keyring.Info
	if b, err := os.ReadFile(h.path("state/keyring.json")); err == nil {
		u, err := keyring.Parse(b)
		if err != nil {
			return err
		}
		roles = u.Info()
	}
	var changes []usagetest.Change
	for _, arg := range args[1:] {
		key, id, ok := strings.Cut(arg, "=")
		if !ok {
			return broken("snapshot: %q; want KEY=KEYID", arg)
		}
		ids := map[string]seal.KeyID{"current": roles.Current.KeyID}
		if len(roles.Retired) > 0 {
			ids["retired"] = roles.Retired[0].KeyID
		}
		if known, ok := ids[id]; ok {
			id = string(known)
		}
		value := []byte("k8s\x00plain")
		if id != "clear" {
			value = usagetest.Encrypted("kleidi", id)
		}
		changes = append(changes, usagetest.Change{Key: "/registry/" + key, Value: value})
	}
	b, err := usagetest.Database(usagetest.Etcd36, changes...)
	if err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	return os.WriteFile(h.abs(args[0]), usagetest.Summed(b), 0o600)
}

// exits runs the binary, which must end in this exit code: exits CODE kleidi ARG...
func (h *host) exits(ts *testscript.TestScript, args []string) error {
	want, err := strconv.Atoi(args[0])
	if err != nil || len(args) < 3 || args[1] != "kleidi" {
		return broken("exits CODE kleidi ARG...")
	}
	err = ts.Exec(binary, append([]string{"--config", h.path("config.yaml")}, args[2:]...)...)
	if wrong := checkJSON(args[2:], ts.ReadFile("stdout")); wrong != nil {
		return &brokenError{wrong}
	}
	code := 0
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		code = exit.ExitCode()
	} else if err != nil {
		return err
	}
	if code != want {
		return broken("the exit code is %d, want %d", code, want)
	}
	return nil
}
