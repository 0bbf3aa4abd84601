package inspect

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/beezy-dev/kleidi/internal/files"
	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// JudgeLog judges event logs by the boot policy in a file. values names a JSON file of PCR
// values by bank; if it is empty, the logs themselves say what the values are. A refused
// boot is no error.
func JudgeLog(policy string, logs attest.Logs, values string) (*bootpolicy.Verdict, error) {
	p, err := files.ReadAnyBootPolicy(policy)
	if err != nil {
		return nil, err
	}
	l, err := logs.Read()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", logs.Firmware, err)
	}
	pcrs, err := p.Claimed(l)
	if values != "" {
		pcrs, err = readPCRs(values, p)
	}
	if err != nil {
		return nil, err
	}
	v := bootpolicy.Judge(p, l, pcrs)
	if v.Accepted && values != "" { // the second replay, as in the gate
		firmware, userspace, err := logs.Bytes()
		if err == nil {
			_, err = attest.VerifyLogs(firmware, userspace, p.Hash(), pcrs)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w; %s", logs.Firmware, err, hintOf(err, "save the log again; if the error stays, the log was tampered with"))
		}
	}
	return v, nil
}

// readPCRs reads the values of the boot policy's bank.
func readPCRs(path string, p *bootpolicy.BootPolicy) (eventlog.PCRs, error) {
	b, err := files.Read(path, 64<<10)
	if err != nil {
		return nil, err
	}
	var banks map[string]map[int]string
	if err := json.Unmarshal(b, &banks); err != nil {
		return nil, fmt.Errorf(`%s: %w; want {"sha256": {"4": "…"}}`, path, err)
	}
	pcrs := eventlog.PCRs{}
	for i, s := range banks[p.Bank] {
		if pcrs[i], err = hex.DecodeString(s); err != nil {
			return nil, fmt.Errorf("%s: PCR %d: %w", path, i, err)
		}
	}
	return pcrs, nil
}

// ErrRefused is the error of a command whose verdict is a refusal.
var ErrRefused = errors.New("the boot policy refuses this boot; see what changed with kleidi bootpolicy explain, and docs/boot-policy.md")
