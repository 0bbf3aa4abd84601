package authpolicy

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// ErrResets says that the machine was reset more often than the condition allows.
var ErrResets = errors.New("the machine was reset more often than allowed")

// Resets is the condition that the TPM was not reset too often: two
// TPM2_PolicyCounterTimer with an unsigned <=, on resetCount and on restartCount.
//
// A boot resets the TPM, which increments resetCount and sets restartCount to zero. After
// TPM2_Shutdown(STATE), which any system can send, a boot is a TPM Restart instead, which
// increments restartCount alone. So the condition does not hold after a TPM Restart or a
// resume from sleep, until the next true reset. TPM2_Clear sets resetCount to zero, and
// destroys every object that was sealed before.
type Resets struct {
	// AtMost is the last resetCount that satisfies the condition, see [ResetCount].
	AtMost uint32
}

// Offsets in TPMS_TIME_INFO (TPM 2.0 Library, Part 2, 10.11): time and clock, of 8
// bytes each, come first.
const (
	resetCountOffset   = 16
	restartCountOffset = 20
)

// limit is one TPM2_PolicyCounterTimer.
type limit struct {
	offset uint16
	atMost uint32
}

func (r Resets) limits() []limit {
	return []limit{{resetCountOffset, r.AtMost}, {restartCountOffset, 0}}
}

// parameters are operandB, offset and operation of TPM2_PolicyCounterTimer.
func (l limit) parameters() (operand, rest []byte) {
	rest = binary.BigEndian.AppendUint16(nil, l.offset)
	return binary.BigEndian.AppendUint32(nil, l.atMost), binary.BigEndian.AppendUint16(rest, uint16(tpm2.TPMEOUnsignedLE))
}

func (r Resets) extend(calc *tpm2.PolicyCalculator) error {
	for _, l := range r.limits() {
		operand, rest := l.parameters()
		if err := calc.Update(tpm2.TPMCCPolicyCounterTimer, hash(operand, rest)); err != nil {
			return err
		}
	}
	return nil
}

func (r Resets) satisfy(t transport.TPM, session tpm2.Session) error {
	for _, l := range r.limits() {
		operand, rest := l.parameters()
		sized := append(binary.BigEndian.AppendUint16(nil, uint16(len(operand))), operand...)
		switch err := policyCommand(t, tpm2.TPMCCPolicyCounterTimer, session.Handle(), append(sized, rest...)); {
		case errors.Is(err, tpm2.TPMRCPolicy):
			return fmt.Errorf("TPM2_PolicyCounterTimer: %w", ErrResets)
		case err != nil:
			return fmt.Errorf("TPM2_PolicyCounterTimer: %w", err)
		}
	}
	return nil
}

// ResetCount returns how often the TPM was reset since it was made or cleared.
// With an audit session the answer is authenticated; without one, anybody may forge it.
func ResetCount(t transport.TPM, audit ...tpm2.Session) (uint32, error) {
	r, err := tpm2.ReadClock{}.Execute(t, audit...)
	if err != nil {
		return 0, fmt.Errorf("TPM2_ReadClock: %w", err)
	}
	return r.CurrentTime.ClockInfo.ResetCount, nil
}

func policyRestart(t transport.TPM, session tpm2.TPMISHPolicy) error {
	return policyCommand(t, tpm2.TPMCCPolicyRestart, session, nil)
}

// policyCommand sends a command for which go-tpm has no structure: one handle, no
// authorization area, and a response that is a response code alone.
func policyCommand(t transport.TPM, code tpm2.TPMCC, session tpm2.TPMISHPolicy, parameters []byte) error {
	const header = 10 // of a command and of a response: tag, size, code
	b := binary.BigEndian.AppendUint16(nil, uint16(tpm2.TPMSTNoSessions))
	b = binary.BigEndian.AppendUint32(b, uint32(header+4+len(parameters)))
	b = binary.BigEndian.AppendUint32(b, uint32(code))
	b = binary.BigEndian.AppendUint32(b, uint32(session))
	r, err := t.Send(append(b, parameters...))
	if err != nil {
		return err
	}
	if len(r) != header || int(binary.BigEndian.Uint32(r[2:])) != len(r) {
		return fmt.Errorf("an answer of %d bytes, want %d", len(r), header)
	}
	if rc := tpm2.TPMRC(binary.BigEndian.Uint32(r[6:])); rc != tpm2.TPMRCSuccess {
		return rc
	}
	return nil
}
