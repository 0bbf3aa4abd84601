package nv

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

// DefaultAnchorIndex is the anchor's NV index, the one after the epoch counter's.
const DefaultAnchorIndex = DefaultEpochIndex + 1

// AnchorSize is the size of what the anchor index holds, in bytes.
const AnchorSize = 56

// The ways in which the anchor's index can be wrong. The errors of [Anchor] wrap one of
// these in a [*seal.Error] with [seal.CauseAnchor].
var (
	// ErrAnchorMissing: there is no index.
	ErrAnchorMissing = errors.New("it is gone from the TPM")
	// ErrAnchorUnwritten: the index was defined and never written. Either a crash came
	// between the two steps, or someone removed the anchor and defined its index again.
	ErrAnchorUnwritten = errors.New("it was never written")
	// ErrAnchorReplaced: another index has its number, or the index has another
	// authorization policy.
	ErrAnchorReplaced = errors.New("another NV index has its place")
)

// Anchor is an NV index that holds the key ID and revision that the node last trusted.
// Only a machine in the boot state of its terms can write the index; anyone can read it.
//
// An attacker with the owner authorization, which is empty on nearly every machine, can
// remove the index from any boot state, and define and fill one of their own. But an
// index's Name is a hash of its attributes and its authorization policy, and this package
// computes the expected Name from code and from the caller's terms. So the attacker can
// only make the anchor go missing, and a missing anchor means locked.
//
// This holds only if the terms come from the running boot and from the configuration.
// They must never come from the keyring or its slots: an attacker who writes those would
// name terms that their own system satisfies. The storage root key must be the node's,
// identified by its Name, or a session salted to it proves nothing.
type Anchor struct {
	index uint32
	owner keys.Owner
}

// NewAnchor returns the anchor at an NV index of the owner's range. owner is needed to
// define and to remove the index, not to read and to write it.
func NewAnchor(index uint32, owner keys.Owner) (*Anchor, error) {
	if err := inOwnersRange(index); err != nil {
		return nil, err
	}
	return &Anchor{index: index, owner: owner}, nil
}

// Index returns the NV index.
func (p *Anchor) Index() uint32 { return p.index }

// Name returns the Name that the index has under these terms once it is written.
// Of signed boot states, only the key and the reference enter it.
func (p *Anchor) Name(terms authpolicy.Terms) ([]byte, error) {
	public, err := p.public(terms)
	if err != nil {
		return nil, err
	}
	public.Attributes.Written = true
	name, err := tpm2.NVName(&public)
	if err != nil {
		return nil, err
	}
	return name.Buffer, nil
}

// public returns the public area of the index before its first write. For the same terms
// it must never change: with any other attribute, existing anchors would not be found.
func (p *Anchor) public(terms authpolicy.Terms) (tpm2.TPMSNVPublic, error) {
	if !bindsBootState(terms) {
		return tpm2.TPMSNVPublic{}, errors.New("an anchor that any boot state could write")
	}
	digest, err := terms.Digest()
	return tpm2.TPMSNVPublic{
		NVIndex:    tpm2.TPMHandle(p.index),
		NameAlg:    tpm2.TPMAlgSHA256,
		DataSize:   AnchorSize,
		AuthPolicy: tpm2.TPM2BDigest{Buffer: digest},
		Attributes: tpm2.TPMANV{PolicyWrite: true, AuthRead: true, NoDA: true, NT: tpm2.TPMNTOrdinary},
	}, err
}

func bindsBootState(terms authpolicy.Terms) bool {
	for _, t := range terms {
		switch t.(type) {
		case authpolicy.PCR, authpolicy.Authorized:
			return true
		}
	}
	return false
}

// Define defines the index if it does not exist. An index that exists for these terms
// stays as it is, written or not. Any other index is [ErrAnchorReplaced].
func (p *Anchor) Define(t transport.TPM, srk *keys.SRK, terms authpolicy.Terms) error {
	public, err := p.public(terms)
	if err != nil {
		return err
	}
	if _, err := p.look(t, terms); !errors.Is(err, ErrAnchorMissing) {
		return err
	}
	return defineSpace(t, srk, p.owner, public)
}

// Remove undefines whatever index has the anchor's number. The caller must know that the
// index is theirs, or intend to replace it. A missing index is not an error.
func (p *Anchor) Remove(t transport.TPM, srk *keys.SRK) error {
	public, err := readPublic(t, p.index)
	if public == nil || err != nil {
		return err
	}
	name, err := tpm2.NVName(public)
	if err != nil {
		return fmt.Errorf("TPM2_NV_ReadPublic: %w", err)
	}
	owner, err := p.owner.OwnerHandle(srk)
	if err != nil {
		return err
	}
	if _, err := (tpm2.NVUndefineSpace{AuthHandle: owner, NVIndex: p.handle(*name)}).Execute(t); err != nil {
		return fmt.Errorf("TPM2_NV_UndefineSpace: %w", keys.OwnerError(err))
	}
	return nil
}

// Replace removes whatever index has the anchor's number and defines it for these terms.
// The new index holds nothing until it is written, so a crash in between means locked.
func (p *Anchor) Replace(t transport.TPM, srk *keys.SRK, terms authpolicy.Terms) error {
	if _, err := p.public(terms); err != nil {
		return err // before anything is lost
	}
	if err := p.Remove(t, srk); err != nil {
		return err
	}
	return p.Define(t, srk, terms)
}

// Read returns what the index holds, authenticated by the TPM as the content of
// the index with the demanded Name.
func (p *Anchor) Read(t transport.TPM, srk *keys.SRK, terms authpolicy.Terms) (value [AnchorSize]byte, err error) {
	found, err := p.look(t, terms)
	if err != nil {
		return value, err
	}
	if !found.written {
		return value, p.wrong(ErrAnchorUnwritten)
	}
	r, err := tpm2.NVRead{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(p.index), Name: found.name, Auth: srk.Session()},
		NVIndex:    p.handle(found.name),
		Size:       AnchorSize,
	}.Execute(t)
	if err != nil {
		return value, p.refused("TPM2_NV_Read", err)
	}
	if len(r.Data.Buffer) != AnchorSize {
		return value, fmt.Errorf("TPM2_NV_Read: %d bytes, want %d", len(r.Data.Buffer), AnchorSize)
	}
	return [AnchorSize]byte(r.Data.Buffer), nil
}

// writeTries bounds how often a write is repeated because any PCR, one of IMA's
// for instance, was extended while the terms were being checked.
const writeTries = 8

// Write replaces the content of the index in one step. In a boot state that does not
// satisfy the terms, the TPM refuses it with [seal.CauseBootState].
func (p *Anchor) Write(t transport.TPM, srk *keys.SRK, terms authpolicy.Terms, value [AnchorSize]byte) error {
	found, err := p.look(t, terms)
	if err != nil {
		return err
	}
	for range writeTries {
		err = p.writeOnce(t, srk, terms, found.name, value)
		if !errors.Is(err, tpm2.TPMRCPCRChanged) {
			break
		}
	}
	return err
}

func (p *Anchor) writeOnce(t transport.TPM, srk *keys.SRK, terms authpolicy.Terms, name tpm2.TPM2BName, value [AnchorSize]byte) error {
	// Salted, so that the confirmation of the write is the TPM's.
	session, done, err := tpm2.PolicySession(t, tpm2.TPMAlgSHA256, authpolicy.NonceSize, tpm2.Salted(srk.Handle, srk.Public))
	if err != nil {
		return fmt.Errorf("TPM2_StartAuthSession: %w", err)
	}
	defer func() { _ = done() }() // a session that the TPM has already ended can't be ended again
	if err := terms.Satisfy(t, session); err != nil {
		return p.unsatisfied(err)
	}
	_, err = tpm2.NVWrite{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(p.index), Name: name, Auth: session},
		NVIndex:    p.handle(name),
		Data:       tpm2.TPM2BMaxNVBuffer{Buffer: value[:]},
	}.Execute(t)
	if err != nil {
		return p.refused("TPM2_NV_Write", err)
	}
	return nil
}

func (p *Anchor) handle(name tpm2.TPM2BName) tpm2.NamedHandle {
	return tpm2.NamedHandle{Handle: tpm2.TPMHandle(p.index), Name: name}
}

// found is an index with one of the two Names that these terms have: before the first
// write, or after it.
type found struct {
	name    tpm2.TPM2BName
	written bool
}

// look finds the index. The answer is a claim until the next command: its session proves
// the Name, or the TPM refuses.
func (p *Anchor) look(t transport.TPM, terms authpolicy.Terms) (found, error) {
	want, err := p.public(terms)
	if err != nil {
		return found{}, err
	}
	public, err := readPublic(t, p.index)
	if err != nil {
		return found{}, err
	}
	if public == nil {
		return found{}, p.wrong(ErrAnchorMissing)
	}
	want.Attributes.Written = public.Attributes.Written
	name, err := tpm2.NVName(&want)
	if err != nil {
		return found{}, err
	}
	if now, err := tpm2.NVName(public); err != nil || !bytes.Equal(now.Buffer, name.Buffer) {
		return found{}, p.wrong(ErrAnchorReplaced)
	}
	return found{name: *name, written: public.Attributes.Written}, nil
}

const (
	anchorHint        = anchorHintWithout + ": run kleidi recover --trust-key-id KEY_ID with the recovery identity, see docs/recovery.md"
	anchorHintWithout = "if Secure Boot, its keys or dbx changed (anchor.pcrs), that is why, else someone tampered with the TPM from another boot"
)

func (p *Anchor) wrong(err error) error {
	e := seal.Errorf(seal.CauseAnchor, anchorHint, "the anchor at NV index %#08x: %w", p.index, err)
	e.NoRecovery = anchorHintWithout + ": undo that change"
	return e
}

// unsatisfied adds a cause to an error of terms that the TPM found not to hold.
func (p *Anchor) unsatisfied(err error) error {
	switch {
	case isAny(err, authpolicy.ErrBootState, authpolicy.ErrNoSignedState, authpolicy.ErrSignature, authpolicy.ErrResets):
		return seal.Errorf(seal.CauseBootState, "boot as the node last did",
			"the anchor at NV index %#08x can't be written in this boot state: %w", p.index, err).OrRecover()
	case isAny(err, authpolicy.ErrEpoch, authpolicy.ErrCounter):
		return seal.Errorf(seal.CauseEpoch, counterHint, "the anchor at NV index %#08x can't be written in this epoch: %w", p.index, err).OrRecover()
	}
	return err
}

// refused derives what is wrong with the index from the TPM's response to a command on
// it (TPM 2.0 Library, Part 3, 31.7 and 31.13).
func (p *Anchor) refused(command string, err error) error {
	var what error
	switch {
	case isAny(err, tpm2.TPMRCHandle):
		what = ErrAnchorMissing
	case isAny(err, tpm2.TPMRCNVUninitialized):
		what = ErrAnchorUnwritten
	case isAny(err, tpm2.TPMRCAuthFail, tpm2.TPMRCBadAuth, tpm2.TPMRCPolicyFail, tpm2.TPMRCAuthUnavailable, tpm2.TPMRCAuthType,
		tpm2.TPMRCNVAuthorization, tpm2.TPMRCNVLocked, tpm2.TPMRCNVRange):
		what = ErrAnchorReplaced
	default:
		return fmt.Errorf("%s: %w", command, err)
	}
	return p.wrong(fmt.Errorf("%w: %s: %w", what, command, err))
}

func isAny(err error, targets ...error) bool {
	return slices.ContainsFunc(targets, func(target error) bool { return errors.Is(err, target) })
}
