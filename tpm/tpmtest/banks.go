package tpmtest

import (
	"encoding/binary"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// Allocate gives the TPM PCRs in these banks only, as a switch in the firmware's
// settings does. The change takes effect at the next boot.
func (m *Machine) Allocate(banks ...tpm2.TPMAlgID) {
	m.t.Helper()
	m.allocate(banks, []byte{0xff, 0xff, 0xff})
}

// AllocatePart gives the TPM PCRs 0 to 6 in a bank, and all PCRs in SHA-256.
func (m *Machine) AllocatePart(bank tpm2.TPMAlgID) {
	m.t.Helper()
	m.allocate([]tpm2.TPMAlgID{tpm2.TPMAlgSHA256, bank}, []byte{0x7f, 0, 0})
}

// allocate gives the TPM these PCRs in the last bank, and all PCRs in the banks before
// it.
func (m *Machine) allocate(banks []tpm2.TPMAlgID, last []byte) {
	m.t.Helper()
	err := m.TPM().Do(m.t.Context(), func(t transport.TPM) error {
		active := map[tpm2.TPMAlgID][]byte{}
		for _, id := range banks {
			active[id] = []byte{0xff, 0xff, 0xff}
		}
		active[banks[len(banks)-1]] = last
		all := []tpm2.TPMAlgID{tpm2.TPMAlgSHA1, tpm2.TPMAlgSHA256, tpm2.TPMAlgSHA384, tpm2.TPMAlgSHA512}
		u16, u32 := binary.BigEndian.AppendUint16, binary.BigEndian.AppendUint32
		body := u32(nil, uint32(tpm2.TPMRHPlatform))
		body = append(u32(u32(body, 9), uint32(tpm2.TPMRSPW)), 0, 0, 0, 0, 0) // a session with the empty password
		body = u32(body, uint32(len(all)))
		for _, id := range all {
			body = append(append(u16(body, uint16(id)), 3), append(active[id], 0, 0, 0)[:3]...)
		}
		const pcrAllocate = 0x0000012b // go-tpm has no such command
		command := u32(u32(u16(nil, uint16(tpm2.TPMSTSessions)), uint32(10+len(body))), pcrAllocate)
		response, err := t.Send(append(command, body...))
		if err != nil {
			return err
		}
		if rc := binary.BigEndian.Uint32(response[6:]); rc != 0 {
			return fmt.Errorf("TPM2_PCR_Allocate: %w", tpm2.TPMRC(rc))
		}
		if response[14] != 1 { // allocationSuccess, after the parameters' size
			return fmt.Errorf("TPM2_PCR_Allocate: the TPM can't have these banks")
		}
		return nil
	})
	if err != nil {
		m.t.Fatal(err)
	}
}
