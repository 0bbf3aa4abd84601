package main

import (
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/nv"
)

// copyCommand is
//
//	copy opens FILE [states=FILE] [cause=CAUSE]
//
// A TPM slot in a kept copy of a keyring opens. It is tried without kleidi's checks, as
// anybody with the copy, this machine and a kept copy of the signed boot states could.
// With "!", the TPM refuses as revoked each slot that opened before, or each slot if none
// was tried; cause names another cause.
func (h *host) copyCommand(ts *testscript.TestScript, args []string) error {
	if len(args) < 2 || args[0] != "opens" {
		return broken("usage: copy opens FILE [states=FILE] [cause=CAUSE]")
	}
	file, states, refused := ts.MkAbs(args[1]), "", seal.CauseEpoch
	for _, arg := range args[2:] {
		switch name, value, _ := strings.Cut(arg, "="); name {
		case "states":
			states = ts.MkAbs(value)
		case "cause":
			refused = seal.Cause(value)
		default:
			return broken("copy: %q", arg)
		}
	}
	w, err := h.attacker(states)
	if err != nil {
		return err
	}
	results, err := h.tryCopy(file, w)
	if err != nil {
		return broken("copy: %w", err)
	}
	if opened := opened(results); len(opened) > 0 {
		h.copies[file] = opened
		return nil
	}
	before := h.copies[file]
	for i, err := range results {
		if (before == nil || slices.Contains(before, i)) && seal.CauseOf(err) != refused {
			return broken("copy: %w", err)
		}
	}
	return errors.New("every slot is refused")
}

func opened(results map[int]error) (slots []int) {
	for i, err := range results {
		if err == nil {
			slots = append(slots, i)
		}
	}
	return slots
}

// tryCopy tries to open each TPM slot of a keyring.
func (h *host) tryCopy(file string, w *tpm.Wrapper) (map[int]error, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	k, err := keyring.Parse(b)
	if err != nil {
		return nil, err
	}
	results := map[int]error{}
	for i, s := range k.Slots() {
		if s.Type != seal.TypeTPM {
			continue
		}
		kek, err := w.Unwrap(h.t.Context(), s)
		if err == nil {
			err = kek.Close()
		}
		results[i] = err
	}
	if len(results) == 0 {
		return nil, errors.New("no slot of a TPM")
	}
	return results, nil
}

// attacker returns the wrapper of somebody who has this machine and the signed boot states
// of a file.
func (h *host) attacker(states string) (*tpm.Wrapper, error) {
	counter, err := nv.NewCounter(nv.DefaultEpochIndex, keys.Owner{})
	if err != nil {
		return nil, err
	}
	config := tpm.Config{Device: h.machine.TPM(), Counter: counter, Node: h.name}
	if states != "" {
		f, err := files.ReadAnyBootStates(states)
		if err != nil {
			return nil, err
		}
		config.Signed = func(s tpm.Signer) []authpolicy.SignedState {
			signed, _ := f.Signed(s.Key, s.Ref)
			return signed
		}
	}
	return tpm.NewWrapper(config), nil
}

// TestEveryClaimIsProved: in each script, a TPM refuses a kept copy right after a command
// has said that copies no longer open.
func TestEveryClaimIsProved(t *testing.T) {
	scripts, err := filepath.Glob("testdata/script/*.txtar")
	if err != nil || len(scripts) == 0 {
		t.Fatalf("no scripts, %v", err)
	}
	const near = 12 // lines
	claim := regexp.MustCompile(`^(stdout|waitfor log) .*no longer open`)
	claims := 0
	for _, script := range scripts {
		b, err := os.ReadFile(script)
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(string(b), "\n")
		for i, line := range lines {
			if !claim.MatchString(line) {
				continue
			}
			claims++
			if !strings.Contains(strings.Join(lines[i:min(i+near, len(lines))], "\n"), "\n! copy opens ") {
				t.Errorf("%s:%d: nothing shows that this is true: %s", script, i+1, line)
			}
		}
	}
	if claims == 0 {
		t.Error("no script holds a claim")
	}
}
