package kmsplugin

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	kmsapi "k8s.io/kms/apis/v2"
	kjson "sigs.k8s.io/json"

	"github.com/beezy-dev/kleidi/seal"
)

// slotFormat is the version of slotData. No other version is read.
const slotFormat = 1

// Limits that kube-apiserver sets on the answers of a KMS v2 plugin, in bytes
// (k8s.io/apiserver, kmsv2/envelope.go).
const (
	maxKeyID       = 1024
	maxCiphertext  = 1024
	maxAnnotations = 32 << 10
)

// slotData is the JSON in Slot.Data. It is untrusted.
type slotData struct {
	Format      int               `json:"format"`
	KeyID       string            `json:"keyID"`
	Ciphertext  []byte            `json:"ciphertext"`
	Annotations map[string][]byte `json:"annotations,omitempty"`
}

// check returns an error unless kube-apiserver would accept the plugin's answer.
func (d slotData) check() error {
	size := 0
	for k, v := range d.Annotations {
		size += len(k) + len(v)
	}
	switch {
	case d.KeyID == "" || len(d.KeyID) > maxKeyID:
		return fmt.Errorf("a key ID of %d bytes, want 1 to %d", len(d.KeyID), maxKeyID)
	case len(d.Ciphertext) == 0 || len(d.Ciphertext) > maxCiphertext:
		return fmt.Errorf("a ciphertext of %d bytes, want 1 to %d", len(d.Ciphertext), maxCiphertext)
	case size > maxAnnotations:
		return fmt.Errorf("annotations of %d bytes, at most %d", size, maxAnnotations)
	}
	return nil
}

func slotOf(answer *kmsapi.EncryptResponse) (seal.Slot, error) {
	d := slotData{slotFormat, answer.KeyId, answer.Ciphertext, answer.Annotations}
	if err := d.check(); err != nil {
		return seal.Slot{}, seal.Errorf(seal.CauseUnavailable, hintPlugin, "kms-plugin: invalid answer: %w", err)
	}
	data, err := json.Marshal(d)
	return seal.Slot{Type: seal.TypeKMSPlugin, Data: data}, err
}

// KeyID returns the plugin's key ID under which a slot was made. The error is
// seal.ErrNotMine if the slot has another type.
func KeyID(slot seal.Slot) (string, error) {
	d, err := parseSlot(slot)
	return d.KeyID, err
}

// Describe describes in one line the plugin's key that a slot names. The result is
// untrusted.
func Describe(slot seal.Slot) string {
	d, err := parseSlot(slot)
	if err != nil {
		return "unreadable"
	}
	return "key " + seal.OneLine(d.KeyID, 80)
}

func parseSlot(slot seal.Slot) (d slotData, err error) {
	if slot.Type != seal.TypeKMSPlugin {
		return d, seal.ErrNotMine
	}
	if len(slot.Data) > seal.MaxSlotData {
		return d, corrupt(fmt.Errorf("%d bytes, at most %d", len(slot.Data), seal.MaxSlotData))
	}
	strict, err := kjson.UnmarshalStrict(slot.Data, &d)
	if err != nil || len(strict) > 0 || strings.TrimSpace(string(slot.Data)) == "null" {
		return slotData{}, corrupt(errors.New("it does not have the form that kleidi writes"))
	}
	if d.Format != slotFormat {
		return slotData{}, corrupt(fmt.Errorf("format %d, this kleidi reads %d", d.Format, slotFormat))
	}
	if err := d.check(); err != nil {
		return slotData{}, corrupt(err)
	}
	return d, nil
}

func corrupt(err error) error {
	return seal.Errorf(seal.CauseSlotCorrupt, hintRestore, "kms-plugin slot: %w", err)
}

const hintPlugin = "see whether the plugin at kmsPlugin.socket runs, and read its log"

const hintRestore = "make the slot again with kleidi slot rewrap NAME while another wrapper holds the keyring open, or run kleidi keyring restore FILE"
