package tpm

import (
	"bytes"
	"context"
	"encoding/json"

	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

// Copies are the copies of a slot that anybody may have kept. The TPM with this EK and
// storage root key opens them until its counter at Index is above AtMost.
type Copies struct {
	EK     string        `json:"ek"`    // digest, see keys.EKDigest
	SRK    keys.HexBytes `json:"srk"`   // Name of the storage root key
	Index  uint32        `json:"index"` // NV index of the epoch counter
	AtMost uint64        `json:"atMost"`
}

// CopiesOf returns where the copies of a TPM slot open. It reads a slot with any epoch
// counter, and so proves nothing: the caller takes the slot from an authenticated
// keyring.
func CopiesOf(slot seal.Slot) (Copies, error) {
	var d struct {
		EK    string        `json:"ek"`
		SRK   keys.HexBytes `json:"srk"`
		Epoch slotEpoch     `json:"epoch"`
	}
	if err := json.Unmarshal(slot.Data, &d); err != nil {
		return Copies{}, corrupt("%w", err)
	}
	return Copies{EK: d.EK, SRK: d.SRK, Index: d.Epoch.Index, AtMost: d.Epoch.AtMost}, nil
}

// SameCounter reports whether one TPM's counter ends both.
func (c Copies) SameCounter(other Copies) bool {
	return bytes.Equal(c.SRK, other.SRK) && c.Index == other.Index
}

// Refuse makes this machine's TPM refuse copies, by raising the counter that they name.
// On another TPM the error's cause is [seal.CauseOtherTPM]. [seal.CauseTPMCleared] says
// that the copies' storage root key is gone, so nothing opens them any more.
func (w *Wrapper) Refuse(ctx context.Context, c Copies, counter Counter) error {
	return classify(w.Device.Do(ctx, func(t transport.TPM) error {
		return w.withSRK(t, &slotData{EK: c.EK, SRK: c.SRK}, func(srk *keys.SRK) error { return counter.RaiseTo(t, srk, c.AtMost+1) })
	}))
}

// EndEpoch ends the present epoch of this machine's own TPM: nothing that was sealed for
// it opens any more. It returns the epoch that begins. A counter that is missing is defined,
// and starts above all former values.
func (w *Wrapper) EndEpoch(ctx context.Context) (epoch uint64, err error) {
	err = w.Device.Do(ctx, func(t transport.TPM) error {
		return keys.WithSRK(t, w.Owner, nil, func(srk *keys.SRK) error {
			now, err := w.Counter.Ensure(t, srk)
			if err != nil {
				return err
			}
			epoch = now + 1
			return w.Counter.RaiseTo(t, srk, epoch)
		})
	})
	return epoch, classify(err)
}
