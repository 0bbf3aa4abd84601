package slotview

import (
	"encoding/hex"
	"fmt"
	"maps"
	"slices"
	"strconv"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/seal/keyring"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

// RecordStates returns the boot states of this node's slots as a record holds them.
func (r Reader) RecordStates(slots []seal.Slot, cluster seal.ClusterID) (all []keyring.RecordedState, err error) {
	demands := r.Demands(slots)
	for _, i := range slices.Sorted(maps.Keys(demands)) {
		d := demands[i]
		s := keyring.RecordedState{Bank: keys.BankName(d.State.Bank), PCRs: map[string]string{}, Use: string(d.State.Use), Resets: d.State.Resets, AtMost: d.AtMost, Second: Second(slots[i].Type)}
		for pcr, value := range d.State.Values {
			s.PCRs[strconv.Itoa(pcr)] = hex.EncodeToString(value)
		}
		if signer := d.State.Signer; signer != nil {
			s.Signer = &keyring.RecordedKey{Key: signer.Area(), Ref: signer.Ref}
		}
		if v := d.State.Verifier; v != nil {
			if v.Cluster != cluster {
				return nil, fmt.Errorf("a slot's verifier agrees for cluster %s, this node is of cluster %s", v.Cluster, cluster)
			}
			s.Verifier = &keyring.RecordedKey{Key: v.Area(), Ref: v.Ref}
		}
		all = append(all, s)
	}
	return all, nil
}

// BootStateOf returns the boot state that a record holds.
func BootStateOf(r keyring.RecordedState, cluster seal.ClusterID) (s tpm.BootState, err error) {
	if s.Bank, err = keys.ParseBank(r.Bank); err != nil {
		return s, err
	}
	s.Use, s.Resets, s.Values = tpm.Use(r.Use), r.Resets, map[int][]byte{}
	for name, value := range r.PCRs {
		pcr, err := strconv.Atoi(name)
		if err != nil {
			return s, err
		}
		if s.Values[pcr], err = hex.DecodeString(value); err != nil {
			return s, err
		}
	}
	if r.Signer != nil {
		signer, err := tpm.ParseSigner(r.Signer.Key, r.Signer.Ref)
		if err != nil {
			return s, fmt.Errorf("the key of signed boot states: %w", err)
		}
		s.Signer = &signer
	}
	if r.Verifier != nil {
		signer, err := tpm.ParseSigner(r.Verifier.Key, r.Verifier.Ref)
		if err != nil {
			return s, fmt.Errorf("the verifier's key: %w", err)
		}
		s.Verifier = &tpm.Verifier{Signer: signer, Cluster: cluster}
	}
	return s, nil
}
