package main

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/beezy-dev/kleidi/hsm"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/recovery"
)

// opener is a way to open a slot.
type opener struct {
	name string
	open func(context.Context) (*seal.Secret, error)
}

// openerOf lets w wrap a KEK, and opens the slot.
func openerOf(ctx context.Context, name string, w seal.Wrapper) (opener, error) {
	kek, err := seal.Memory{}.NewKEK()
	if err != nil {
		return opener{}, err
	}
	defer kek.Close()
	slot, err := w.Wrap(ctx, kek)
	return opener{name, func(ctx context.Context) (*seal.Secret, error) { return w.Unwrap(ctx, slot) }}, err
}

// inMemory decrypts a KEK with a key in memory: the lower bound for opening a slot.
func inMemory() (opener, error) {
	block, err := aes.NewCipher(make([]byte, 32))
	if err != nil {
		return opener{}, err
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return opener{}, err
	}
	kek := make([]byte, seal.KEKSize)
	rand.Read(kek)
	wrapped := aead.Seal(nil, nil, kek, nil)
	return opener{"in memory, AES-256-GCM", func(context.Context) (*seal.Secret, error) {
		b, err := aead.Open(nil, nil, wrapped, nil)
		if err != nil {
			return nil, err
		}
		return seal.Memory{}.Take(b)
	}}, nil
}

// makers set up wrappers by name, each in a separate folder. The last result ends the
// programs that were started.
var makers = map[string]func(ctx context.Context, dir string) (opener, func(), error){
	"recovery": func(ctx context.Context, _ string) (opener, func(), error) {
		identity, recipient, err := recovery.GenerateIdentity(seal.Memory{})
		if err != nil {
			return opener{}, nil, err
		}
		w, err := recovery.NewWrapper(seal.Memory{}, []string{recipient})
		if err == nil {
			w, err = w.WithIdentity(identity)
		}
		if err != nil {
			return opener{}, nil, err
		}
		o, err := openerOf(ctx, "recovery, age X25519", w)
		return o, func() { identity.Close() }, err
	},
	"pkcs11": func(ctx context.Context, dir string) (opener, func(), error) {
		w, err := newToken(ctx, dir)
		if err != nil {
			return opener{}, nil, fmt.Errorf("%w; install softhsm2 and gcc, or leave pkcs11 out of -wrappers", err)
		}
		o, err := openerOf(ctx, "pkcs11, SoftHSM", w)
		return o, func() {}, err
	},
	"vault": func(ctx context.Context, dir string) (opener, func(), error) {
		w, stop, err := startVault(ctx, dir)
		if err != nil {
			return opener{}, nil, err
		}
		o, err := openerOf(ctx, "vault, loopback, a token", w)
		return o, stop, err
	},
}

const softHSM = "/usr/lib/softhsm/libsofthsm2.so"

// newToken makes a token in SoftHSM, with a key.
func newToken(ctx context.Context, dir string) (*hsm.Wrapper, error) {
	config, pin := filepath.Join(dir, "softhsm2.conf"), filepath.Join(dir, "pin")
	if err := os.WriteFile(config, []byte("directories.tokendir = "+dir+"\nobjectstore.backend = file\nlog.level = ERROR\n"), 0o600); err != nil {
		return nil, err
	}
	if err := os.WriteFile(pin, []byte("benchmark"), 0o600); err != nil {
		return nil, err
	}
	if err := os.Setenv("SOFTHSM2_CONF", config); err != nil {
		return nil, err
	}
	out, err := exec.CommandContext(ctx, "softhsm2-util", "--init-token", "--free", "--label", "bench", "--so-pin", "benchmark", "--pin", "benchmark").CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("softhsm2-util: %w\n%s", err, out)
	}
	w, err := hsm.New(hsm.Config{Module: softHSM, URI: "pkcs11:token=bench;object=kek", PINFile: pin})
	if err != nil {
		return nil, err
	}
	_, err = w.GenerateKey(ctx)
	return w, err
}

// printOpening times how long each wrapper takes to open its slot, in turns, and prints
// how much longer that is than opening in memory and than opening with the TPM.
func printOpening(ctx context.Context, o options, dir string, sealed opener) error {
	memory, err := inMemory()
	if err != nil {
		return err
	}
	all := []opener{memory, sealed}
	for name := range strings.SplitSeq(o.wrappers, ",") {
		maker, ok := makers[name]
		if !ok {
			return fmt.Errorf("-wrappers: there is no %q, but recovery, pkcs11 and vault", name)
		}
		sub, err := os.MkdirTemp(dir, name)
		if err != nil {
			return err
		}
		made, stop, err := maker(ctx, sub)
		if stop != nil {
			defer stop()
		}
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		all = append(all, made)
	}
	took, err := inTurns(ctx, all)
	if err != nil {
		return err
	}
	fmt.Printf("opening one slot, median of %d in turns; all on this machine, in software, so a device or a network adds to it\n", wrapperRuns)
	fmt.Printf("%-26s %10s %12s %10s\n", "", "ms", "× in memory", "× the TPM")
	for i, op := range all {
		fmt.Printf("%-26s %10.3f %12.1f %10.2f\n", op.name, took[i].Seconds()*1e3, float64(took[i])/float64(took[0]), float64(took[i])/float64(took[1]))
	}
	fmt.Println()
	return nil
}

// wrapperRuns is how often each slot is opened.
const wrapperRuns = 41

// inTurns returns the median for each opener: it opens all once, then all again.
func inTurns(ctx context.Context, all []opener) ([]time.Duration, error) {
	took := make([][]time.Duration, len(all))
	for range wrapperRuns + 1 {
		for i, op := range all {
			begin := time.Now()
			kek, err := op.open(ctx)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", op.name, err)
			}
			took[i] = append(took[i], time.Since(begin))
			kek.Close()
		}
	}
	medians := make([]time.Duration, len(all))
	for i, t := range took {
		t = t[1:] // the first run warms up
		slices.Sort(t)
		medians[i] = t[len(t)/2]
	}
	return medians, nil
}
