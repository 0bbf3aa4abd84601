package main

import (
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/beezy-dev/kleidi/internal/carry"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
)

// forgeExport changes an export like an attacker who knows this host's KEK, or no KEK:
//
//	forge export flipped IN OUT         one word of the keyring, without its MAC
//	forge export without NODE IN OUT    a later revision that does not list a node
//	forge export kek IN OUT             a later revision under a KEK of the attacker's
func (h *host) forgeExport(ts *testscript.TestScript, args []string) error {
	f, err := carry.ParseFile([]byte(ts.ReadFile(args[len(args)-2])))
	if err != nil {
		return err
	}
	if args[0] == "flipped" {
		f.Keyring, err = forgeBody(string(f.Keyring), `"revision":`, `"revision":9`)
	} else {
		f.Keyring, err = h.revised(args)
	}
	if err != nil {
		return broken("forge export: %w", err)
	}
	b, err := f.Marshal()
	if err != nil {
		return err
	}
	return os.WriteFile(h.abs(args[len(args)-1]), b, 0o600)
}

// revised returns a later revision of this host's shared keyring, under the MAC of
// somebody who knows its KEK.
func (h *host) revised(args []string) ([]byte, error) {
	u, kek, err := h.unsealCopy(h.path("state/keyring.json"))
	if err != nil {
		return nil, err
	}
	k, err := u.Open(kek, nil)
	if err != nil {
		return nil, err
	}
	defer k.Close()
	switch args[0] {
	case "without":
		k, err = k.WithoutNode(args[1])
	case "kek":
		k, err = underAnotherKEK(k)
	default:
		err = fmt.Errorf("no such forgery: %s", strings.Join(args, " "))
	}
	if err != nil {
		return nil, err
	}
	defer k.Close()
	late, err := k.AtLeast(1000) // higher than any other node's
	if err != nil {
		return nil, err
	}
	defer late.Close()
	return late.Shared(), nil
}

func underAnotherKEK(k *keyring.Keyring) (*keyring.Keyring, error) {
	evil, err := seal.Memory{}.NewKEK()
	if err != nil {
		return nil, err
	}
	staged, err := k.Stage(evil, nil, time.Now())
	if err != nil {
		return nil, err
	}
	defer staged.Close()
	own, err := staged.WithOwnSlots(staged.OwnSlots(), staged.OwnSlots())
	if err != nil {
		return nil, err
	}
	defer own.Close()
	return own.Activate(time.Now())
}
