package inspect

import (
	"cmp"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/internal/slotview"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// StateReport is one signed boot state in the output of list.
type StateReport struct {
	File       string `json:"file"`
	Key        string `json:"key"`
	Generation uint64 `json:"generation"`
	Bank       string `json:"bank"`
	PCRs       []int  `json:"pcrs"`
	What       string `json:"what,omitempty"`
	// Counts says whether a slot exists for the key and generation.
	Counts bool `json:"counts"`
}

// ListStates reads the files of signed boot states, and says which of them have a slot in
// the keyring that r describes.
func ListStates(paths []string, r admin.StatusReport) ([]StateReport, error) {
	cluster, err := seal.ParseClusterID(r.ClusterID)
	if err != nil {
		return nil, cmp.Or(r.Problem.Err(), err)
	}
	states := []StateReport{}
	for _, path := range paths {
		f, err := files.ReadBootStates(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		for _, s := range f.States() {
			g, known := slotview.Generation(cluster, s.Ref)
			e := StateReport{File: path, Key: hex.EncodeToString(s.KeyFingerprint[:]), Generation: g, Bank: eventlog.BankName(s.Bank), PCRs: s.PCRs, What: s.What}
			e.Counts = known && slices.ContainsFunc(r.Slots, func(slot admin.SlotReport) bool { return slot.Signer == e.Key && slot.Generation == g })
			states = append(states, e)
		}
	}
	return states, nil
}
