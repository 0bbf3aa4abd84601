// Package nv keeps the node's epoch counter and its anchor in the TPM's NV memory, where
// restoring an old disk does not bring an old value back.
package nv

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

// DefaultEpochIndex is the epoch counter's NV index, in the range that belongs
// to the owner (TCG Registry of Reserved TPM 2.0 Handles, 2.2).
const DefaultEpochIndex = 0x0180_4B01

// Counter is a node's epoch counter: an NV counter, which only rises. A counter that was
// undefined and defined again starts above every value that any counter of the TPM has
// reached, so removing it brings no revoked slot back; it only locks the node.
type Counter struct {
	index uint32
	owner keys.Owner
	name  tpm2.TPM2BName
}

// NewCounter returns the counter at an NV index of the owner's range.
func NewCounter(index uint32, owner keys.Owner) (*Counter, error) {
	if err := inOwnersRange(index); err != nil {
		return nil, err
	}
	public := template(index)
	public.Attributes.Written = true
	name, err := tpm2.NVName(&public)
	if err != nil {
		return nil, err
	}
	return &Counter{index: index, owner: owner, name: *name}, nil
}

func inOwnersRange(index uint32) error {
	if index < 0x0180_0000 || index > 0x01BF_FFFF {
		return fmt.Errorf("NV index %#08x is not in the owner's range, 0x01800000 to 0x01bfffff", index)
	}
	return nil
}

// template is the counter's public area before its first write. Anyone may read the
// counter, with an empty authorization value: it is no secret, and TPM2_PolicyNV must read
// it. The owner may increment it.
func template(index uint32) tpm2.TPMSNVPublic {
	return tpm2.TPMSNVPublic{
		NVIndex:  tpm2.TPMHandle(index),
		NameAlg:  tpm2.TPMAlgSHA256,
		DataSize: 8,
		Attributes: tpm2.TPMANV{
			OwnerWrite: true, OwnerRead: true, AuthRead: true, NoDA: true, NT: tpm2.TPMNTCounter,
		},
	}
}

// Index returns the NV index.
func (c *Counter) Index() uint32 { return c.index }

// Name returns the Name that the counter must have, computed from the template:
// an index of another kind in its place has another Name.
func (c *Counter) Name() []byte { return c.name.Buffer }

func (c *Counter) handle() tpm2.NamedHandle {
	return tpm2.NamedHandle{Handle: tpm2.TPMHandle(c.index), Name: c.name}
}

const counterHint = "slots sealed under it no longer open: bring the TPM's state back"

// Read returns the counter's value, authenticated by the TPM.
func (c *Counter) Read(t transport.TPM, srk *keys.SRK) (uint64, error) {
	exists, written, err := c.look(t)
	if err != nil {
		return 0, err
	}
	if !exists || !written {
		return 0, seal.Errorf(seal.CauseEpoch, counterHint, "the epoch counter at NV index %#08x is gone from the TPM", c.index).OrRecover()
	}
	r, err := tpm2.NVRead{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(c.index), Name: c.name, Auth: srk.Session()},
		NVIndex:    c.handle(),
		Size:       8,
	}.Execute(t)
	if err != nil {
		return 0, fmt.Errorf("TPM2_NV_Read: %w", err)
	}
	if len(r.Data.Buffer) != 8 {
		return 0, fmt.Errorf("TPM2_NV_Read: %d bytes, want 8", len(r.Data.Buffer))
	}
	return binary.BigEndian.Uint64(r.Data.Buffer), nil
}

// Ensure defines the counter if the TPM has none, and returns its value. Calling it again,
// even after a crash between its steps, is harmless.
func (c *Counter) Ensure(t transport.TPM, srk *keys.SRK) (uint64, error) {
	exists, written, err := c.look(t)
	if err != nil {
		return 0, err
	}
	if !exists {
		if err := c.define(t, srk); err != nil {
			return 0, err
		}
	}
	if !written {
		if err := c.increment(t, srk); err != nil {
			return 0, err
		}
	}
	return c.Read(t, srk)
}

// RaiseTo increments the counter until it is at least value, which ends the epochs below
// value. It refuses to raise the counter by more than tpm.MaxRaise.
func (c *Counter) RaiseTo(t transport.TPM, srk *keys.SRK, value uint64) error {
	now, err := c.Read(t, srk)
	if err != nil || now >= value {
		return err
	}
	if value-now > tpm.MaxRaise {
		return seal.Errorf(seal.CauseEpoch, "if this is a virtual TPM that was rolled back, bring its state back",
			"the epoch counter is at %d and the slots are of epoch %d", now, value).OrRecover()
	}
	for ; now < value; now++ {
		if err := c.increment(t, srk); err != nil {
			return err
		}
	}
	return nil
}

// look reports whether the counter exists and was written. Another index with the
// counter's number is an error.
func (c *Counter) look(t transport.TPM) (exists, written bool, err error) {
	public, err := readPublic(t, c.index)
	if public == nil || err != nil {
		return false, false, err
	}
	written = public.Attributes.Written
	public.Attributes.Written = true
	name, err := tpm2.NVName(public)
	if err != nil {
		return false, false, fmt.Errorf("TPM2_NV_ReadPublic: %w", err)
	}
	if !bytes.Equal(name.Buffer, c.name.Buffer) {
		return false, false, seal.Errorf(seal.CauseEpoch,
			"if another program owns that index, set tpm.epochIndex before kleidi init; if it was kleidi's, someone replaced it: "+counterHint,
			"NV index %#08x holds something other than the epoch counter", c.index).OrRecover()
	}
	return true, written, nil
}

// readPublic returns an index's public area, or nil if there is no such index. The answer
// is not authenticated: anybody on the bus may have forged it.
func readPublic(t transport.TPM, index uint32) (*tpm2.TPMSNVPublic, error) {
	r, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(index)}.Execute(t)
	if errors.Is(err, tpm2.TPMRCHandle) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("TPM2_NV_ReadPublic: %w", err)
	}
	public, err := r.NVPublic.Contents()
	if err != nil {
		return nil, fmt.Errorf("TPM2_NV_ReadPublic: %w", err)
	}
	return public, nil
}

func (c *Counter) define(t transport.TPM, srk *keys.SRK) error {
	return defineSpace(t, srk, c.owner, template(c.index))
}

func defineSpace(t transport.TPM, srk *keys.SRK, owner keys.Owner, public tpm2.TPMSNVPublic) error {
	handle, err := owner.OwnerHandle(srk)
	if err != nil {
		return err
	}
	if _, err := (tpm2.NVDefineSpace{AuthHandle: handle, PublicInfo: tpm2.New2B(public)}).Execute(t); err != nil {
		return fmt.Errorf("TPM2_NV_DefineSpace: %w", keys.OwnerError(err))
	}
	return nil
}

func (c *Counter) increment(t transport.TPM, srk *keys.SRK) error {
	owner, err := c.owner.OwnerHandle(srk)
	if err != nil {
		return err
	}
	r, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(c.index)}.Execute(t) // its Name changes with the first write
	if err != nil {
		return fmt.Errorf("TPM2_NV_ReadPublic: %w", err)
	}
	cmd := tpm2.NVIncrement{AuthHandle: owner, NVIndex: tpm2.NamedHandle{Handle: tpm2.TPMHandle(c.index), Name: r.NVName}}
	if _, err := cmd.Execute(t); err != nil {
		return fmt.Errorf("TPM2_NV_Increment: %w", keys.OwnerError(err))
	}
	return nil
}
