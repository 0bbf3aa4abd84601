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

// snapshot writes the file of an etcd snapshot: snapshot FILE KEY=KEYID... The key ID
// "clear" stores in the clear, and "current" and "retired" stand for key IDs of the keyring.
func (h *host) snapshot(ts *testscript.TestScript, args []string) error {
	if len(args) < 2 {
		return broken("snapshot FILE KEY=KEYID...")
	}
	changes, err := h.changes(args[1:])
	if err != nil {
		return err
	}
	b, err := usagetest.Database(usagetest.Etcd36, changes...)
	if err != nil {
		return fmt.Errorf("snapshot: %w", err)
	}
	return os.WriteFile(h.abs(args[0]), usagetest.Summed(b), 0o600)
}

// changes reads KEY=KEYID..., as snapshot describes it. KEY= deletes the key.
func (h *host) changes(args []string) ([]usagetest.Change, error) {
	var roles keyring.Info
	if b, err := os.ReadFile(h.path("state/keyring.json")); err == nil {
		u, err := keyring.Parse(b)
		if err != nil {
			return nil, err
		}
		roles = u.Info()
	}
	var changes []usagetest.Change
	for _, arg := range args {
		key, id, ok := strings.Cut(arg, "=")
		if !ok {
			return nil, broken("snapshot: %q; want KEY=KEYID", arg)
		}
		ids := map[string]seal.KeyID{"current": roles.Current.KeyID}
		if len(roles.Retired) > 0 {
			ids["retired"] = roles.Retired[0].KeyID
		}
		if known, ok := ids[id]; ok {
			id = string(known)
		}
		value := []byte("k8s\x00plain")
		switch id {
		case "":
			value = nil
		case "clear":
		default:
			value = usagetest.Encrypted("kleidi", id)
		}
		changes = append(changes, usagetest.Change{Key: "/registry/" + key, Value: value})
	}
	return changes, nil
}

// retired puts the key ID of the oldest retired KEK into $RETIRED.
func (h *host) retired(ts *testscript.TestScript, _ []string) error {
	b, err := os.ReadFile(h.path("state/keyring.json"))
	if err != nil {
		return err
	}
	u, err := keyring.Parse(b)
	if err != nil {
		return err
	}
	ts.Setenv("RETIRED", string(u.Info().Retired[0].KeyID))
	return nil
}

// etcd is `etcd KEY=KEYID...`: a running etcd, whose URL is in $ETCD, with these values
// in addition to earlier ones. All hosts of a script share one.
func (h *host) etcdCommand(ts *testscript.TestScript, args []string) error {
	changes, err := h.changes(args)
	if err != nil {
		return err
	}
	if h.etcd == nil {
		h.etcd = usagetest.StartEtcd(ts.Defer)
		ts.Setenv("ETCD", h.etcd.URL)
	}
	h.etcd.Put(changes...)
	return nil
}

// exits runs the binary, which must end with this exit code: exits CODE kleidi ARG...
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
