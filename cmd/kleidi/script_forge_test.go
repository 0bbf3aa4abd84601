package main

import (
	"bytes"
	"crypto"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/seal/recovery"
	"github.com/beezy-dev/kleidi/tpm/bootstate"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/nv"
)

// forge writes a keyring as changed by an attacker, or by a bad disk:
//
//	forge truncated|oversized|flipped|duplicate|unknown|version IN OUT
//	forge edited IN OUT OLD NEW     replace text in the document, under its MAC
//	forge slots IN FROM OUT         put the slots of FROM into IN, under its MAC
//	forge attacker OUT              an attacker's KEK, sealed to this TPM as
//	                                kleidi would, in a consistent keyring
//	forge recipient IN RECIPIENT OUT  what root makes of a keyring whose TPM opens it:
//	                                one more recovery recipient, under its own MAC
//	forge anchor KEYRING PCRS       write the anchor of a keyring to the TPM, as any
//	                                system with these PCRs can
func (h *host) forge(ts *testscript.TestScript, args []string) error {
	var out []byte
	var err error
	switch args[0] {
	case "anchor":
		return h.forgeAnchor(ts, args[1], args[2])
	case "export":
		return h.forgeExport(ts, args[1:])
	case "attacker":
		out, err = h.forgeAttacker()
	case "recipient":
		out, err = h.forgeRecipient(ts.MkAbs(args[1]), args[2])
	case "slots":
		out, err = forgeSlots(ts.ReadFile(args[1]), ts.ReadFile(args[2]))
	case "edited":
		out, err = forgeBody(ts.ReadFile(args[1]), args[3], args[4])
		args = args[:3]
	default:
		out, err = forgeFile(args[0], ts.ReadFile(args[1]))
	}
	if err != nil {
		return broken("forge: %w", err)
	}
	return os.WriteFile(h.abs(args[len(args)-1]), out, 0o600)
}

// unsealCopy opens a TPM slot of a kept copy of a keyring.
func (h *host) unsealCopy(file string) (*keyring.Untrusted, *seal.Secret, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, nil, err
	}
	k, err := keyring.Parse(b)
	if err != nil {
		return nil, nil, err
	}
	w, err := h.attacker("")
	if err != nil {
		return nil, nil, err
	}
	err = errors.New("no slot of a TPM")
	for _, slot := range k.Slots() {
		if slot.Type != seal.TypeTPM {
			continue
		}
		var kek *seal.Secret
		if kek, err = w.Unwrap(h.t.Context(), slot); err == nil {
			return k, kek, nil
		}
	}
	return nil, nil, err
}

func (h *host) forgeRecipient(file, recipient string) ([]byte, error) {
	u, kek, err := h.unsealCopy(file)
	if err != nil {
		return nil, err
	}
	w, err := recovery.NewWrapper(seal.Memory{}, []string{recipient})
	if err != nil {
		return nil, err
	}
	slot, err := w.Wrap(h.t.Context(), kek)
	if err != nil {
		return nil, err
	}
	k, err := u.Open(kek, nil)
	if err != nil {
		return nil, err
	}
	defer k.Close()
	next, err := k.WithSlots(append(k.Slots(), slot))
	if err != nil {
		return nil, err
	}
	defer next.Close()
	return next.Marshal(), nil
}

// forgeAnchor needs no KEK: the keyring contains everything that the anchor holds.
func (h *host) forgeAnchor(ts *testscript.TestScript, file, list string) error {
	k, err := keyring.Parse([]byte(ts.ReadFile(file)))
	if err != nil {
		return err
	}
	b, err := keyring.Anchor{ClusterID: k.ClusterID(), KeyID: k.CurrentID(), Revision: k.Revision()}.Bytes()
	if err != nil {
		return err
	}
	index, err := nv.NewAnchor(nv.DefaultAnchorIndex, keys.Owner{})
	if err != nil {
		return err
	}
	var pcrs []int
	if err := json.Unmarshal([]byte("["+list+"]"), &pcrs); err != nil {
		return broken("forge anchor: %w", err)
	}
	return (&nv.AnchorStore{Anchor: index, Device: h.machine.TPM(), Bank: crypto.SHA256, PCRs: pcrs}).Save(h.t.Context(), b)
}

type envelope struct {
	Body []byte `json:"body"`
	MAC  []byte `json:"mac"`
}

func (e envelope) encode() []byte {
	b64 := base64.StdEncoding.EncodeToString
	return fmt.Appendf(nil, `{"body":%q,"mac":%q}`+"\n", b64(e.Body), b64(e.MAC))
}

func forgeFile(how, in string) ([]byte, error) {
	switch how {
	case "truncated":
		return []byte(in[:len(in)*2/3]), nil
	case "oversized":
		return []byte(strings.Replace(in, "}", strings.Repeat(" ", keyring.MaxSize)+"}", 1)), nil
	case "flipped":
		b := []byte(in)
		b[len(b)/3] ^= 1
		return b, nil
	case "duplicate":
		return forgeBody(in, `"revision":`, `"revision":1,"revision":`)
	case "unknown":
		return forgeBody(in, `"revision":`, `"colour":"red","revision":`)
	case "version":
		return forgeBody(in, `"format":1`, `"format":3`)
	}
	return nil, fmt.Errorf("%s: no such forgery", how)
}

func forgeBody(in, old, with string) ([]byte, error) {
	var e envelope
	if err := json.Unmarshal([]byte(in), &e); err != nil {
		return nil, err
	}
	body := bytes.ReplaceAll(e.Body, []byte(old), []byte(with))
	if bytes.Equal(body, e.Body) {
		return nil, fmt.Errorf("%q is not in the keyring", old)
	}
	e.Body = body
	return e.encode(), nil
}

func forgeSlots(in, from string) ([]byte, error) {
	var slots [2]string
	for i, file := range []string{in, from} {
		var e envelope
		if err := json.Unmarshal([]byte(file), &e); err != nil {
			return nil, err
		}
		var body struct {
			Current struct {
				Slots json.RawMessage `json:"slots"`
			} `json:"current"`
		}
		if err := json.Unmarshal(e.Body, &body); err != nil {
			return nil, err
		}
		slots[i] = string(body.Current.Slots)
	}
	return forgeBody(in, slots[0], slots[1])
}

// forgeAttacker does what anyone with this TPM can do: it seals a new KEK under the
// right authorization policy, and makes a keyring with it.
func (h *host) forgeAttacker() ([]byte, error) {
	cfg, err := config.Load(h.path("config.yaml"))
	if err != nil {
		return nil, err
	}
	n, err := node.New(cfg, logger(cfg), nil)
	if err != nil {
		return nil, err
	}
	defer n.Close()
	stored, err := os.ReadFile(cfg.Keyring())
	if err != nil {
		return nil, err
	}
	ours, err := keyring.Parse(stored)
	if err != nil {
		return nil, err
	}
	kek, err := n.Memory.NewKEK()
	if err != nil {
		return nil, err
	}
	slot, err := n.TPM.Wrap(h.t.Context(), kek)
	if err != nil {
		return nil, err
	}
	k, err := keyring.New(ours.ClusterID(), kek, []seal.Slot{slot}, []keyring.Node{{Name: cfg.Node}}, time.Now())
	if err != nil {
		return nil, err
	}
	defer k.Close()
	later, err := k.AtLeast(1000)
	if err != nil {
		return nil, err
	}
	defer later.Close()
	return later.Marshal(), nil
}

// pkfp puts the fingerprint of the signing key of a file of boot states into $KEY.
func (h *host) pkfp(ts *testscript.TestScript, args []string) error {
	f, err := bootstate.Parse([]byte(ts.ReadFile(args[0])))
	if err != nil || len(f.States()) == 0 {
		return broken("pkfp: %w", err)
	}
	ts.Setenv("KEY", fmt.Sprintf("%x", f.States()[0].KeyFingerprint))
	return nil
}

// trust puts the current key ID of a keyring into $TRUST, and its cluster ID into
// $CLUSTER.
func (h *host) trust(ts *testscript.TestScript, args []string) error {
	u, err := keyring.Parse([]byte(ts.ReadFile(args[0])))
	if err != nil {
		return broken("trust: %w", err)
	}
	ts.Setenv("TRUST", string(u.CurrentID()))
	ts.Setenv("CLUSTER", u.ClusterID().String())
	return nil
}
