package gather

import (
	"bytes"
	"context"
	"crypto"
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/beezy-dev/kleidi/internal/doctor"
	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/bootrule"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

func fromTPM(ctx context.Context, n *node.Node) doctor.Known[doctor.TPM] {
	p, err := keys.ReadPermanent(ctx, n.Gate.Device)
	return known(doctor.TPM{OwnerAuthSet: p.OwnerAuthSet, InLockout: p.InLockout, Failed: p.Failed, Most: p.Most}, err)
}

// boot reads logs and PCRs. Nothing here is authenticated. It only explains: kleidi
// serve's own demands before it opens anything stay as strict as they are.
func boot(ctx context.Context, n *node.Node, t doctor.Known[doctor.TPM]) doctor.Known[doctor.Boot] {
	var b doctor.Boot
	log, err := n.Gate.Logs.Read()
	if err != nil {
		b.LogProblem, _ = seal.SplitHint(err)
		return known(b, nil)
	}
	bank, pcrs := n.Config.Bank(), sealedTo(ctx, n)
	if len(pcrs) == 0 {
		if pcrs, err = n.Gate.ChoosePCRs(); err != nil {
			pcrs = bootrule.Decisive()
		}
	}
	if t.Value == nil {
		return known(b, errors.New("the TPM does not answer"))
	}
	values, err := keys.PCRs(ctx, n.Gate.Device, bank, pcrs)
	if err != nil {
		return known(b, err)
	}
	b.PCRs, b.Type = slices.Sorted(maps.Keys(values)), string(log.BootType())
	if log, err = verified(n.Gate.Logs, log, bank, values); err != nil {
		b.Mismatch = err.Error()
	}
	binding := bootrule.Of(log, b.PCRs)
	b.Whole = binding.Whole
	for _, o := range binding.Open {
		b.Open = append(b.Open, fmt.Sprintf("%s (%s)", o.Part, o.Why))
	}
	for _, i := range b.PCRs {
		if atReset(values[i]) {
			b.AtReset = append(b.AtReset, i)
		}
	}
	if phases := log.Phases(); len(phases) > 0 {
		b.Phase = phases[len(phases)-1]
	}
	if r := log.Restarted(); r != eventlog.NoRestart {
		b.Restart = r.String()
	}
	return known(b, nil)
}

// verified compares the logs with the values, and returns the log with the phases that an
// older systemd measured without logging them.
func verified(logs attest.Logs, log *eventlog.Log, bank crypto.Hash, values eventlog.PCRs) (*eventlog.Log, error) {
	firmware, userspace, err := logs.Explaining(bank, values)
	if err != nil {
		return log, err
	}
	if full, err := attest.VerifyLogs(firmware, userspace, bank, values); err == nil {
		return full, nil
	} else {
		return log, err
	}
}

// sealedTo returns the PCRs that this node's slots of the stored keyring name.
func sealedTo(ctx context.Context, n *node.Node) []int {
	u, _, err := n.Stored(ctx)
	if err != nil {
		return nil
	}
	all := map[int]bool{}
	for _, s := range n.View.BootStates(u.Slots(), tpm.UsePresent) {
		for i := range s.Values {
			all[i] = true
		}
	}
	return slices.Sorted(maps.Keys(all))
}

// atReset reports whether value is that of a PCR into which nothing was measured.
func atReset(value []byte) bool {
	return len(value) > 0 && (bytes.Count(value, []byte{0}) == len(value) || bytes.Count(value, []byte{0xff}) == len(value))
}

// digests returns the logs' events without their data, which may name files and disks.
func digests(n *node.Node) (all []doctor.Digest) {
	log, err := n.Gate.Logs.Read()
	if err != nil {
		return nil
	}
	for _, e := range log.Events {
		all = append(all, doctor.Digest{PCR: e.PCR, Type: e.UntrustedType.String(), Digest: fmt.Sprintf("%x", e.Digest(n.Config.Bank()))})
	}
	return all
}
