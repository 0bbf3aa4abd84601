package reseal

import (
	"errors"
	"fmt"
	"slices"

	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/bootstate"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/predict"
)

// Signing holds the arguments of kleidi bootstate sign.
type Signing struct {
	Key, Cluster, Out, What, Bank string
	Generation                    uint64
	Systemd                       bool
	Pcrs                          []int
	Logs                          attest.Logs
	Files                         NextFiles
}

// Sign signs the boot state, and returns it together with the file that holds it.
func (s *Signing) Sign() (state bootstate.State, file []byte, err error) {
	ref, err := s.ref()
	if err != nil {
		return state, nil, err
	}
	pem, err := files.ReadPrivateKey(s.Key)
	if err != nil {
		return state, nil, err
	}
	defer clear(pem)
	signer, err := bootstate.ParsePrivateKey(pem)
	if err != nil {
		return state, nil, fmt.Errorf("%s: %w", s.Key, err)
	}
	boot, err := s.boot()
	if err != nil {
		return state, nil, err
	}
	if state, err = bootstate.Sign(signer, boot.PCR, ref, s.What); err != nil {
		return state, nil, err
	}
	f, err := bootstate.New(state)
	if err != nil {
		return state, nil, err
	}
	b, err := f.Marshal()
	return state, append(b, '\n'), err
}

func (s *Signing) ref() ([]byte, error) {
	if s.Systemd {
		if s.Cluster != "" {
			return nil, errors.New("--systemd and --cluster-id exclude each other; give one of them")
		}
		return nil, nil
	}
	cluster, err := seal.ParseClusterID(s.Cluster)
	if err != nil {
		return nil, fmt.Errorf("--cluster-id: %w; kleidi status shows it", err)
	}
	if s.Generation < 1 || s.Generation > slotview.MaxGeneration {
		return nil, fmt.Errorf("--generation %d; want 1 to %d", s.Generation, slotview.MaxGeneration)
	}
	return bootstate.Ref(cluster, s.Generation), nil
}

// boot returns the boot state to sign.
func (s *Signing) boot() (tpm.BootState, error) {
	bank, err := keys.ParseBank(s.Bank)
	if err != nil {
		return tpm.BootState{}, fmt.Errorf("--bank: %w", err)
	}
	log, err := s.Logs.Read()
	if err != nil {
		return tpm.BootState{}, err
	}
	change, err := s.Files.Change()
	if err != nil {
		return tpm.BootState{}, err
	}
	if n := change.Next; n.UKI != nil || n.Kernel != nil || n.Initrd != nil || n.GRUBConfig != nil || n.CommandLine != nil || change.Dbx != nil {
		if log, err = predict.Predict(log, change); err != nil {
			return tpm.BootState{}, err
		}
	}
	pcrs := s.Pcrs
	switch {
	case len(pcrs) == 0 && s.Systemd:
		pcrs = []int{11}
	case len(pcrs) == 0:
		pcrs = slices.DeleteFunc(log.BootType().PCRs(log), func(i int) bool { return i == 7 || i == 14 })
	}
	if len(pcrs) == 0 {
		return tpm.BootState{}, errors.New("the event log shows neither a unified kernel image nor GRUB nor the kernel's EFI stub; name the PCRs with --pcrs")
	}
	return attest.Predicted(log, bank, pcrs)
}
