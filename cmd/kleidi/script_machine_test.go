package main

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/slowtpm"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// hardware is the hardware of a host. hw/tpm.sock, hw/log, hw/userspace and hw/boot
// lead to the machine in use, so that another machine can replace it.
type hardware struct {
	machine *tpmtest.Machine
	former  *tpmtest.Machine // the machine before `machine other`
	proxy   *tpmtest.Proxy
}

// machineCommand is
//
//	machine boot [LOADER] [FIELD=VALUE...]   boot, the first time a new machine
//	machine off | on                         switch it off, or boot as before
//	machine clear                            clear its TPM
//	machine other                            boot another machine in its place
//	machine swap                             put the machine before that back in its place
//	machine save | load                      keep its TPM's state, or bring it back and boot
//	machine proxy                            put a proxy before its TPM
//	machine banks BANK...                    give its TPM PCRs in these banks alone, and boot
//	machine slow                             make its TPM as slow as a slow discrete one
//	machine owner SECRET                     give its TPM an owner authorization value
//	machine guess N                          have a program guess a password N times
//	machine forgive                          have its TPM forget wrong passwords
//	machine undefine INDEX                   remove an NV index, as any boot can
//	machine files DIR [LOADER] [FIELD=VALUE...]  write the files of such a boot
func (h *host) machineCommand(ts *testscript.TestScript, args []string) error {
	if len(args) == 0 || h.machine == nil && args[0] != "boot" && args[0] != "files" {
		return broken("machine: boot it first")
	}
	switch args[0] {
	case "boot":
		b, err := parseBoot(args[1:])
		if err != nil {
			return broken("machine boot: %w", err)
		}
		if h.machine == nil {
			return h.install(tpmtest.New(h.t, b))
		}
		h.machine.Reboot(b)
		return h.lead(h.device())
	case "off":
		return h.machine.PowerOff()
	case "on":
		h.machine.Reboot(h.machine.Current())
		return nil
	case "clear":
		return h.machine.Clear(h.t.Context())
	case "swap":
		h.machine, h.former, h.proxy = h.former, h.machine, nil
		return h.lead(h.device())
	case "save", "load":
		return h.saveTPM(args[0])
	case "other":
		h.former = h.machine
		return h.install(tpmtest.New(h.t, simboot.Baseline(simboot.UKI)))
	case "banks":
		return h.allocate(args[1:])
	case "owner":
		return h.setOwnerAuth(args[1])
	case "guess":
		return h.guess(args[1])
	case "forgive":
		return h.machine.TPM().Do(h.t.Context(), forgive)
	case "undefine":
		return h.undefine(args[1])
	case "files":
		b, err := parseBoot(args[2:])
		if err != nil {
			return broken("machine files: %w", err)
		}
		f, err := b.Files()
		if err != nil {
			return err
		}
		return f.Write(h.path(args[1]))
	case "slow":
		return h.slowDown()
	case "proxy":
		h.proxy = tpmtest.NewProxy(h.t, h.machine)
		return h.lead(h.proxy.Address())
	}
	return broken("machine %s: no such command", args[0])
}

// saveTPM keeps a TPM's state in a folder beside it, or restores that state, as the
// snapshot of a virtual machine does.
func (h *host) saveTPM(direction string) error {
	boot := h.machine.Current()
	if err := h.machine.PowerOff(); err != nil {
		return err
	}
	from, to := filepath.Join(h.machine.Dir(), "tpm"), h.path("tpm-saved")
	if direction == "load" {
		from, to = to, from
	}
	if err := os.RemoveAll(to); err != nil {
		return err
	}
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		return err
	}
	h.machine.Reboot(boot)
	return nil
}

func (h *host) allocate(names []string) error {
	known := map[string]tpm2.TPMAlgID{"sha1": tpm2.TPMAlgSHA1, "sha256": tpm2.TPMAlgSHA256, "sha384": tpm2.TPMAlgSHA384}
	var banks []tpm2.TPMAlgID
	for _, name := range names {
		id, ok := known[name]
		if !ok {
			return broken("machine banks: no bank %q", name)
		}
		banks = append(banks, id)
	}
	h.machine.Allocate(banks...)
	h.machine.Reboot(h.machine.Current())
	return h.lead(h.device())
}

func (h *host) slowDown() error {
	path := h.path("hw/slow.sock")
	t, err := slowtpm.Listen(path, strings.TrimPrefix(h.machine.Device(), "unix:"), slowtpm.Fast)
	if err != nil {
		return err
	}
	h.t.Cleanup(t.Close)
	return h.lead("unix:" + path)
}

func (h *host) setOwnerAuth(secret string) error {
	return h.machine.TPM().Do(h.t.Context(), func(t transport.TPM) error {
		_, err := tpm2.HierarchyChangeAuth{
			AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Name: tpm2.HandleName(tpm2.TPMRHOwner), Auth: tpm2.PasswordAuth(nil)},
			NewAuth:    tpm2.TPM2BAuth{Buffer: []byte(secret)},
		}.Execute(t)
		return err
	})
}

// guess gives the TPM wrong passwords for an object that is not exempt from its lockout.
func (h *host) guess(times string) error {
	n, err := strconv.Atoi(times)
	if err != nil {
		return broken("machine guess: %w", err)
	}
	return h.machine.TPM().Do(h.t.Context(), func(t transport.TPM) error {
		made, err := tpm2.CreatePrimary{
			PrimaryHandle: tpm2.TPMRHNull,
			InSensitive: tpm2.TPM2BSensitiveCreate{Sensitive: &tpm2.TPMSSensitiveCreate{
				UserAuth: tpm2.TPM2BAuth{Buffer: []byte("right")}, Data: tpm2.NewTPMUSensitiveCreate(&tpm2.TPM2BSensitiveData{Buffer: []byte("x")})}},
			InPublic: tpm2.New2B(tpm2.TPMTPublic{Type: tpm2.TPMAlgKeyedHash, NameAlg: tpm2.TPMAlgSHA256, ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, UserWithAuth: true}}),
		}.Execute(t)
		if err != nil {
			return err
		}
		defer func() { _, _ = tpm2.FlushContext{FlushHandle: made.ObjectHandle}.Execute(t) }()
		for range n {
			_, err = tpm2.Unseal{ItemHandle: tpm2.AuthHandle{Handle: made.ObjectHandle, Name: made.Name, Auth: tpm2.PasswordAuth([]byte("wrong"))}}.Execute(t)
		}
		if err == nil {
			return broken("machine guess: the wrong password is accepted")
		}
		return nil
	})
}

// forgive sends TPM2_DictionaryAttackLockReset with the empty lockout authorization. go-tpm
// does not have the command.
func forgive(t transport.TPM) error {
	answer, err := t.Send([]byte{0x80, 0x02, 0, 0, 0, 27, 0, 0, 0x01, 0x39, 0x40, 0, 0, 0x0a, 0, 0, 0, 9, 0x40, 0, 0, 0x09, 0, 0, 0, 0, 0})
	if err != nil {
		return err
	}
	if len(answer) < 10 || !bytes.Equal(answer[6:10], make([]byte, 4)) {
		return broken("TPM2_DictionaryAttackLockReset: %x", answer)
	}
	return nil
}

func (h *host) undefine(index string) error {
	i, err := strconv.ParseUint(index, 0, 32)
	if err != nil {
		return err
	}
	return h.machine.TPM().Do(h.t.Context(), func(t transport.TPM) error {
		public, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(i)}.Execute(t)
		if err != nil {
			return err
		}
		_, err = tpm2.NVUndefineSpace{
			AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Name: tpm2.HandleName(tpm2.TPMRHOwner), Auth: tpm2.PasswordAuth(nil)},
			NVIndex:    tpm2.NamedHandle{Handle: tpm2.TPMHandle(i), Name: public.NVName},
		}.Execute(t)
		return err
	})
}

func parseBoot(args []string) (simboot.Boot, error) {
	loader := simboot.UKI
	if len(args) > 0 && !strings.Contains(args[0], "=") {
		loader, args = simboot.Loader(args[0]), args[1:]
	}
	b := simboot.Baseline(loader)
	for _, arg := range args {
		name, value, _ := strings.Cut(arg, "=")
		field := reflect.ValueOf(&b).Elem().FieldByName(name)
		switch {
		case !field.IsValid():
			return b, errors.New("no field " + name)
		case field.Kind() == reflect.Bool:
			on, err := strconv.ParseBool(value)
			if err != nil {
				return b, err
			}
			field.SetBool(on)
		default:
			field.SetString(value)
		}
	}
	return b, nil
}

func (h *host) install(m *tpmtest.Machine) error {
	h.machine, h.proxy = m, nil
	return h.lead(h.device())
}

func (h *host) device() string {
	if h.proxy != nil {
		return h.proxy.Address()
	}
	return h.machine.Device()
}

// lead makes the configured paths lead to the present machine.
func (h *host) lead(device string) error {
	for name, target := range map[string]string{
		"tpm.sock": strings.TrimPrefix(device, "unix:"), "log": h.machine.EventLog(), "userspace": h.machine.UserspaceLog(), "boot": h.machine.Files(),
	} {
		link := h.path("hw/" + name)
		if err := os.Remove(link); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := os.Symlink(target, link); err != nil {
			return err
		}
	}
	return nil
}

// proxyCommand makes the TPM fail: proxy vanish|return|hang|drop|lockout|heal,
// increment (no counter moves) or garbage NAME.
func (h *host) proxyCommand(ts *testscript.TestScript, args []string) error {
	switch strings.Join(args[:1], "") {
	case "vanish":
		h.proxy.Vanish()
	case "return":
		h.proxy.Return()
	case "heal":
		h.proxy.Heal()
	case "hang":
		h.proxy.Inject(tpmtest.Fault{Do: tpmtest.Hang})
	case "increment":
		h.proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCNVIncrement, Do: tpmtest.Hang})
	case "drop":
		h.proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCUnseal, Do: tpmtest.Drop})
	case "lockout":
		h.proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCUnseal, Do: tpmtest.Code(tpm2.TPMRCLockout)})
	case "garbage":
		n, ok := tpmtest.Garbage()[strings.Join(args[1:], " ")]
		if !ok {
			return broken("no such garbage")
		}
		h.proxy.Inject(tpmtest.Fault{Do: tpmtest.Raw(n.Answer)})
	default:
		return broken("proxy %q: no such command", args)
	}
	return nil
}
