package authpolicy

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// Epoch is the condition that the node's epoch counter is not above AtMost:
// TPM2_PolicyNV with an unsigned <=. A slot for the next epoch already satisfies it before
// the counter is incremented, so the slot can be saved first.
type Epoch struct {
	// Index is the counter's NV index.
	Index uint32
	// Name is the counter's Name as computed from code, never as read from a TPM or a
	// file. Another index with the counter's number then fails the condition.
	Name []byte
	// AtMost is the last counter value that satisfies the condition.
	AtMost uint64
}

func (e Epoch) command() tpm2.PolicyNV {
	index := tpm2.NamedHandle{Handle: tpm2.TPMHandle(e.Index), Name: tpm2.TPM2BName{Buffer: e.Name}}
	return tpm2.PolicyNV{
		AuthHandle: tpm2.AuthHandle{Handle: index.Handle, Name: index.Name, Auth: tpm2.PasswordAuth(nil)},
		NVIndex:    index,
		OperandB:   tpm2.TPM2BOperand{Buffer: binary.BigEndian.AppendUint64(nil, e.AtMost)},
		Operation:  tpm2.TPMEOUnsignedLE,
	}
}

func (e Epoch) extend(calc *tpm2.PolicyCalculator) error { return e.command().Update(calc) }

func (e Epoch) satisfy(t transport.TPM, session tpm2.Session) error {
	cmd := e.command()
	cmd.PolicySession = session.Handle()
	switch _, err := cmd.Execute(t); {
	case errors.Is(err, tpm2.TPMRCPolicy):
		return fmt.Errorf("TPM2_PolicyNV: %w", ErrEpoch)
	case slices.ContainsFunc(notTheCounter, func(rc tpm2.TPMRC) bool { return errors.Is(err, rc) }):
		return fmt.Errorf("TPM2_PolicyNV: %w: %w", ErrCounter, err)
	case err != nil:
		return fmt.Errorf("TPM2_PolicyNV: %w", err)
	}
	return nil
}
