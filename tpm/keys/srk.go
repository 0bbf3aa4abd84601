package keys

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/internal/ownership"
	"github.com/beezy-dev/kleidi/internal/regular"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/device"
)

// srkHandle is where a provisioned TPM keeps its storage root key (TCG TPM v2.0
// Provisioning Guidance, 7.5.1). The key belongs to others: kleidi uses it, and never
// evicts or replaces it.
const srkHandle = tpm2.TPMHandle(0x81000001)

// Owner is the owner hierarchy's authorization.
type Owner struct {
	// File holds the owner authorization value, at most 64 bytes; one newline at its
	// end is dropped. If File is empty, so is the value, as on nearly every machine.
	File string
}

// auth is a session that authorizes for the owner hierarchy. The value does not cross
// the bus.
func (o Owner) auth(opts ...tpm2.AuthOption) (tpm2.Session, error) {
	if o.File == "" {
		return tpm2.PasswordAuth(nil), nil
	}
	value, err := o.read()
	if err != nil {
		return nil, seal.Caused(seal.CauseCredentials, "see tpm.ownerAuthFile", "owner authorization", err)
	}
	return &ownerSession{tpm2.HMAC(tpm2.TPMAlgSHA256, NonceSize, append(opts, tpm2.Auth(value))...), value}, nil
}

// maxOwnerAuth is the longest authorization value in bytes, of a TPM with SHA-512.
const maxOwnerAuth = 64

// read returns the value, which nobody else may change. The caller clears it.
func (o Owner) read() ([]byte, error) {
	f, err := regular.Open(o.File)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := ownership.CheckOpen(f); err != nil {
		return nil, err
	}
	b := make([]byte, maxOwnerAuth+2) // in one buffer, so that no copy stays behind
	n, err := io.ReadFull(f, b)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return nil, err
	}
	value := bytes.TrimSuffix(b[:n], []byte("\n"))
	if len(value) > maxOwnerAuth {
		clear(b)
		return nil, fmt.Errorf("%s is longer than %d bytes", o.File, maxOwnerAuth)
	}
	return value, nil
}

// ownerSession is the session of one command. It clears the value once that has ended.
type ownerSession struct {
	tpm2.Session
	value []byte
}

// Validate implements tpm2.Session.
func (s *ownerSession) Validate(rc tpm2.TPMRC, cc tpm2.TPMCC, parms []byte, names []tpm2.TPM2BName, authIndex int, auth *tpm2.TPMSAuthResponse) error {
	defer clear(s.value)
	return s.Session.Validate(rc, cc, parms, names, authIndex, auth)
}

// CleanupFailure implements tpm2.Session.
func (s *ownerSession) CleanupFailure(t transport.TPM) error {
	defer clear(s.value)
	return s.Session.CleanupFailure(t)
}

// withSalt runs f with an option that salts a session to a key of the null hierarchy, where
// nobody has an authorization value to give away. Without a salt, whoever listens could try
// values against the session's HMAC. If the owner has no authorization value, there is
// nothing to hide.
func (o Owner) withSalt(t transport.TPM, f func(...tpm2.AuthOption) error) error {
	if o.File == "" {
		return f()
	}
	r, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHNull, Name: tpm2.HandleName(tpm2.TPMRHNull), Auth: tpm2.PasswordAuth(nil)},
		InPublic:      tpm2.New2B(tpm2.ECCSRKTemplate),
	}.Execute(t)
	if err != nil {
		return fmt.Errorf("TPM2_CreatePrimary of a key for salts: %w", err)
	}
	defer Flush(t, r.ObjectHandle)
	public, err := r.OutPublic.Contents()
	if err != nil {
		return fmt.Errorf("key for salts: %w", err)
	}
	return f(tpm2.Salted(r.ObjectHandle, *public))
}

// OwnerHandle is TPM_RH_OWNER, authorized in a session salted to srk.
func (o Owner) OwnerHandle(srk *SRK) (tpm2.AuthHandle, error) {
	s, err := o.auth(srk.Salted())
	return tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Name: tpm2.HandleName(tpm2.TPMRHOwner), Auth: s}, err
}

// NonceSize is the size of a session's caller nonce in bytes.
const NonceSize = 16

// SRK is the storage root key, loaded for the duration of a WithSRK.
type SRK struct {
	Handle tpm2.TPMHandle
	Name   tpm2.TPM2BName
	Public tpm2.TPMTPublic
	shared *sharedSession // nil if there is no session to share
}

// Auth is the SRK itself, authorized by its empty value.
func (s *SRK) Auth(session tpm2.Session) tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: s.Handle, Name: s.Name, Auth: session}
}

// Salted is an option that salts a session to the SRK.
func (s *SRK) Salted() tpm2.AuthOption { return tpm2.Salted(s.Handle, s.Public) }

// Session is an HMAC session salted to the SRK. A response that it authenticates came
// from this TPM. Without options it is one session for all commands while the SRK is
// loaded, because starting a session costs the TPM an elliptic-curve multiplication.
// Each command and each response has fresh nonces.
func (s *SRK) Session(opts ...tpm2.AuthOption) tpm2.Session {
	if len(opts) == 0 && s.shared != nil {
		return s.shared
	}
	return tpm2.HMAC(tpm2.TPMAlgSHA256, NonceSize, append(opts, s.Salted())...)
}

// sharedSession is an HMAC session that is started for the first command that uses it.
type sharedSession struct {
	tpm2.Session // nil until the first command
	salted       tpm2.AuthOption
	end          func() error
}

// Init implements tpm2.Session.
func (s *sharedSession) Init(t transport.TPM) (err error) {
	if s.Session == nil {
		var started tpm2.Session
		if started, s.end, err = tpm2.HMACSession(t, tpm2.TPMAlgSHA256, NonceSize, s.salted); err == nil {
			s.Session = started
		}
	}
	return err
}

// ErrOtherSRK says that the TPM's SRK has another Name than the wanted one.
var ErrOtherSRK = errors.New("the TPM's storage root key is another one")

// WithSRK runs f with the storage root key: the TCG's ECC P-256 template in the owner
// hierarchy. want is the Name that it must have, or nil to take the TPM's own. WithSRK
// uses the persistent key at 0x81000001 if that key has the Name want. Otherwise it
// makes the key again as a transient primary, and flushes it.
func WithSRK(t transport.TPM, owner Owner, want []byte, f func(*SRK) error) error {
	keys, done := srksOf(t)
	defer done()
	if srk := keys.named(t, want); srk != nil {
		return f(srk)
	}
	srk, err := keys.primary(t, owner)
	if err != nil {
		return err
	}
	if want != nil && !bytes.Equal(srk.Name.Buffer, want) {
		return ErrOtherSRK
	}
	return f(srk)
}

// withAnySRK runs f with the persistent key at 0x81000001 if that key has the Name
// prefer, which needs no owner authorization and no time. Otherwise it makes the key
// again.
func withAnySRK(t transport.TPM, owner Owner, prefer []byte, f func(*SRK) error) error {
	keys, done := srksOf(t)
	defer done()
	srk := keys.named(t, prefer)
	if srk == nil {
		var err error
		if srk, err = keys.primary(t, owner); err != nil {
			return err
		}
	}
	return f(srk)
}

// srks are the loaded storage root keys: at most the persistent one and a transient
// primary.
type srks struct{ persistent, transient *SRK }

// srksOf returns the storage root keys of a held connection, or none for any other
// connection, and a function that releases them.
func srksOf(t transport.TPM) (keys *srks, done func()) {
	shared := device.Held(t)
	if shared == nil {
		keys = new(srks)
		return keys, func() { keys.Release(t) }
	}
	keys, ok := (*shared).(*srks)
	if !ok {
		keys = new(srks)
		*shared = keys
	}
	return keys, func() {}
}

// named returns the storage root key of that Name, if it is loaded or persistent.
func (k *srks) named(t transport.TPM, want []byte) *SRK {
	for _, srk := range []*SRK{k.transient, k.persistent} {
		if srk != nil && bytes.Equal(srk.Name.Buffer, want) {
			return srk
		}
	}
	srk := persistentSRK(t, want)
	if srk != nil {
		k.persistent = srk
	}
	return srk
}

// primary returns the storage root key as a transient primary.
func (k *srks) primary(t transport.TPM, owner Owner) (*SRK, error) {
	if k.transient != nil {
		return k.transient, nil
	}
	var r *tpm2.CreatePrimaryResponse
	err := owner.withSalt(t, func(salt ...tpm2.AuthOption) error {
		auth, err := owner.auth(salt...)
		if err != nil {
			return err
		}
		r, err = tpm2.CreatePrimary{
			PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Name: tpm2.HandleName(tpm2.TPMRHOwner), Auth: auth},
			InPublic:      tpm2.New2B(tpm2.ECCSRKTemplate),
		}.Execute(t)
		if err != nil {
			return fmt.Errorf("TPM2_CreatePrimary: %w", OwnerError(err))
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	srk, err := newSRK(r.ObjectHandle, &r.OutPublic)
	if err != nil {
		Flush(t, r.ObjectHandle)
		return nil, err
	}
	k.transient = srk
	return srk, nil
}

// Release implements [device.Kept]: it ends the sessions and flushes the transient key.
func (k *srks) Release(t transport.TPM) {
	for _, srk := range []*SRK{k.transient, k.persistent} {
		if srk != nil && srk.shared.Session != nil {
			_ = srk.shared.end() // see Flush
		}
	}
	if k.transient != nil {
		Flush(t, k.transient.Handle)
	}
	*k = srks{}
}

// persistentSRK returns the key at 0x81000001 if it has the Name want. Any other key
// there belongs to others, and is no fault.
func persistentSRK(t transport.TPM, want []byte) *SRK {
	if want == nil {
		return nil
	}
	r, err := tpm2.ReadPublic{ObjectHandle: srkHandle}.Execute(t)
	if err != nil {
		return nil
	}
	srk, err := newSRK(srkHandle, &r.OutPublic)
	if err != nil || !bytes.Equal(srk.Name.Buffer, want) {
		return nil
	}
	return srk
}

// newSRK computes the Name itself, because an impostor could send any Name.
func newSRK(h tpm2.TPMHandle, public *tpm2.TPM2BPublic) (*SRK, error) {
	pub, err := public.Contents()
	if err != nil {
		return nil, fmt.Errorf("storage root key: %w", err)
	}
	name, err := tpm2.ObjectName(pub)
	if err != nil {
		return nil, fmt.Errorf("storage root key: %w", err)
	}
	srk := &SRK{Handle: h, Name: *name, Public: *pub}
	srk.shared = &sharedSession{salted: srk.Salted()}
	return srk, nil
}

// OwnerError gives the cause to a refusal of the owner authorization.
func OwnerError(err error) error {
	if errors.Is(err, tpm2.TPMRCBadAuth) || errors.Is(err, tpm2.TPMRCAuthFail) {
		return seal.Errorf(seal.CauseCredentials, "put the owner authorization value into a file and name it in tpm.ownerAuthFile",
			"the TPM's owner hierarchy has an authorization value, and the one given is not it: %w", err)
	}
	return err
}

// Flush frees a handle. A failed flush does not fail the operation: the next operation
// flushes what is left.
func Flush(t transport.TPM, h tpm2.TPMHandle) { _, _ = tpm2.FlushContext{FlushHandle: h}.Execute(t) }
