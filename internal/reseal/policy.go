package reseal

import (
	"context"
	"fmt"
	"slices"

	"github.com/beezy-dev/kleidi/internal/node"
	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
)

// RecordPolicy records a boot policy from a log that a fresh quote has verified. It
// does not judge the boot: the present boot policy may belong to another boot.
func RecordPolicy(ctx context.Context, n *node.Node, pcrs []int) (*bootpolicy.BootPolicy, error) {
	pcrs, err := RecordedPCRs(n, pcrs)
	if err != nil {
		return nil, err
	}
	unjudged := attest.Gate{Attester: n.Gate.Attester, Bank: n.Gate.Bank}
	r, err := unjudged.AttestPCRs(ctx, pcrs)
	if err != nil {
		return nil, err
	}
	return bootpolicy.Record(r.Log, r.Bank, pcrs)
}

// maxPCR is the highest PCR of a TPM of a PC (TCG PC Client Platform TPM Profile).
const maxPCR = 23

// RecordedPCRs returns pcrs, or the PCRs to record if none are named.
func RecordedPCRs(n *node.Node, pcrs []int) ([]int, error) {
	if len(pcrs) == 0 {
		sealed, err := n.Gate.ChoosePCRs()
		if err != nil {
			return nil, err
		}
		pcrs = append([]int{0}, sealed...)
	}
	if i := slices.IndexFunc(pcrs, func(pcr int) bool { return pcr < 0 || pcr > maxPCR }); i >= 0 {
		return nil, fmt.Errorf("--pcrs: there is no PCR %d; want 0 to %d", pcrs[i], maxPCR)
	}
	slices.Sort(pcrs)
	return slices.Compact(pcrs), nil
}
