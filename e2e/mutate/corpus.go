package main

import (
	"bytes"
	"context"
	"crypto"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
	"github.com/beezy-dev/kleidi/tpm/device"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/simboot"
)

// source is an unmutated boot.
type source struct {
	name    string
	log     *eventlog.Log // the firmware's
	records []string      // of systemd's log, each with its separator
	demands []*demand
}

// demand is a demand on a boot: a boot policy recorded from it, and evidence that the
// boot policy accepts.
type demand struct {
	policy *bootpolicy.BootPolicy
	bank   crypto.Hash
	pcrs   []int
	honest measured
	quote  keys.Quote
}

// allPCRs are the PCRs that a boot policy can judge. IMA's PCR is left out, because IMA
// has a separate log.
var allPCRs = []int{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15}

// corpus returns the unmutated boots: boots recorded on virtual machines with real
// firmware, the test logs of other projects, and boots of every type on a simulated
// machine with a real TPM 2.0.
func corpus(ctx context.Context, s *signer) ([]*source, error) {
	root, err := output("go", "list", "-m", "-f", "{{.Dir}}", "github.com/beezy-dev/kleidi")
	if err != nil {
		return nil, err
	}
	testdata := filepath.Join(root, "tpm/eventlog/testdata")
	recorded, err := recordedBoots(s, testdata)
	if err != nil {
		return nil, err
	}
	public, err := publicLogs(s, filepath.Join(testdata, "public"))
	if err != nil {
		return nil, err
	}
	simulated, err := simulatedBoots(ctx)
	if err != nil {
		return nil, err
	}
	return slices.Concat(recorded, public, simulated), nil
}

func output(name string, args ...string) (string, error) {
	out, err := exec.Command(name, args...).Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w", name, strings.Join(args, " "), err)
	}
	return strings.TrimSpace(string(out)), nil
}

// recordedBoots have the values of their TPM. Each is used unchanged, and also as
// systemd 261 would have left it: with a separator of the operating system in the
// userspace log.
func recordedBoots(s *signer, folder string) ([]*source, error) {
	separators := ""
	for _, pcr := range []int{0, 1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 14} {
		separators += newRecord(pcr, eventlog.OSSeparator)
	}
	var all []*source
	for _, name := range []string{"uki-secureboot", "shim-grub-secureboot", "direct-kernel"} {
		raw, err := os.ReadFile(filepath.Join(folder, name, "binary_bios_measurements"))
		if err != nil {
			return nil, err
		}
		plain, err := s.signed(name, raw, nil)
		if err != nil {
			return nil, err
		}
		if err := plain.compare(filepath.Join(folder, name, "pcrs.json")); err != nil {
			return nil, err
		}
		later, err := s.signed(name+", os-separator", raw, []byte(separators))
		if err != nil {
			return nil, err
		}
		all = append(all, plain, later)
	}
	return all, nil
}

// compare demands that the quoted values equal those in a file.
func (s *source) compare(path string) error {
	for _, d := range s.demands {
		values, err := readValues(path, d.bank)
		if err != nil {
			return err
		}
		for _, pcr := range d.pcrs {
			if !bytes.Equal(values[pcr], d.quote.PCRs[pcr]) {
				return fmt.Errorf("%s: the log does not lead to the TPM's value of PCR %d", s.name, pcr)
			}
		}
	}
	return nil
}

func readValues(path string, bank crypto.Hash) (map[int][]byte, error) {
	raw, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var all map[string]map[string]string
	if err := json.Unmarshal(raw, &all); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	values := map[int][]byte{}
	for pcr, v := range all[strings.ToUpper(name(bank))] {
		i, err := strconv.Atoi(pcr)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		if values[i], err = hex.DecodeString(v); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	}
	return values, nil
}

// newRecord returns a measurement in the form of systemd's log.
func newRecord(pcr int, text string) string {
	var digests []string
	for _, h := range []crypto.Hash{crypto.SHA1, crypto.SHA256, crypto.SHA384, crypto.SHA512} {
		sum := h.New()
		sum.Write([]byte(text))
		digests = append(digests, fmt.Sprintf(`{"hashAlg":%q,"digest":"%x"}`, eventlog.BankName(h), sum.Sum(nil)))
	}
	return fmt.Sprintf("\x1e{\"pcr\":%d,\"digests\":[%s],\"content_type\":\"systemd\",\"content\":{\"string\":%q,\"eventType\":\"phase\"}}\n",
		pcr, strings.Join(digests, ","), text)
}

// publicLogs are the test logs of other projects. Package eventlog tests that logs of
// TPM 1.2 are refused.
func publicLogs(s *signer, folder string) ([]*source, error) {
	files, err := filepath.Glob(filepath.Join(folder, "*/*"))
	if err != nil {
		return nil, err
	}
	var all []*source
	for _, file := range files {
		raw, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		if _, err := eventlog.Parse(raw); err != nil {
			continue
		}
		b, err := s.signed(filepath.Base(file), raw, nil)
		if err != nil {
			return nil, err
		}
		all = append(all, b)
	}
	if len(all) < 15 {
		return nil, fmt.Errorf("only %d public logs were read from %s", len(all), folder)
	}
	slices.SortFunc(all, func(a, b *source) int { return strings.Compare(a.name, b.name) })
	return all, nil
}

// simulatedBoots were extended into a TPM, which quoted them.
func simulatedBoots(ctx context.Context) (all []*source, err error) {
	dir, err := os.MkdirTemp("", "mutate")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	m, err := simboot.New(dir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, m.PowerOff()) }()
	phased, insecure := simboot.Baseline(simboot.UKI), simboot.Baseline(simboot.UKI)
	phased.Phases, insecure.SecureBoot = simboot.AllPhases, false
	for name, boot := range map[string]simboot.Boot{"UKI": simboot.Baseline(simboot.UKI), "UKI, phases": phased, "UKI, Secure Boot off": insecure,
		"GRUB": simboot.Baseline(simboot.GRUB), "EFI stub": simboot.Baseline(simboot.EFIStub)} {
		if err := m.Boot(ctx, boot); err != nil {
			return nil, err
		}
		b, err := collect(ctx, "simulated "+name, m)
		if err != nil {
			return nil, err
		}
		all = append(all, b)
	}
	slices.SortFunc(all, func(a, b *source) int { return strings.Compare(a.name, b.name) })
	return all, nil
}

// collect asks the machine's TPM for the quotes.
func collect(ctx context.Context, name string, m *simboot.Machine) (*source, error) {
	address, err := device.ParseAddress(m.Device())
	if err != nil {
		return nil, err
	}
	firmware, err := os.ReadFile(m.EventLog())
	if err != nil {
		return nil, err
	}
	userspace, err := os.ReadFile(m.UserspaceLog())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	device := device.New(address, 0)
	return newSource(name, firmware, userspace, func(bank crypto.Hash, pcrs []int) (*keys.Quote, error) {
		return keys.Quoter{Device: device}.Quote(ctx, nil, nonce, bank, pcrs)
	})
}

// signed makes a source from a log without a quote.
func (s *signer) signed(name string, firmware, userspace []byte) (*source, error) {
	return newSource(name, firmware, userspace, func(bank crypto.Hash, pcrs []int) (*keys.Quote, error) {
		return s.quote(bank, read(bank, firmware, userspace).values(bank, pcrs))
	})
}

// newSource demands all PCRs, and those that kleidi seals to, in each bank of the log
// that can be judged.
func newSource(name string, firmware, userspace []byte, quote func(crypto.Hash, []int) (*keys.Quote, error)) (*source, error) {
	log, err := eventlog.Parse(firmware)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	s := &source{name: name, log: log}
	for _, record := range strings.Split(string(userspace), "\x1e")[1:] {
		s.records = append(s.records, "\x1e"+record)
	}
	for _, bank := range []crypto.Hash{crypto.SHA256, crypto.SHA384} {
		for _, pcrs := range [][]int{allPCRs, log.BootType().PCRs(log)} {
			if len(pcrs) == 0 || !slices.Contains(log.Banks, bank) {
				continue
			}
			q, err := quote(bank, pcrs)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			e := &attest.Evidence{Quote: *q, FirmwareLog: firmware, UserspaceLog: userspace}
			result, err := attest.Verify(e, nonce, bank, pcrs)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			policy, err := bootpolicy.Record(result.Log, bank, pcrs)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			s.demands = append(s.demands, &demand{policy, bank, pcrs, read(bank, firmware, userspace), *q})
		}
	}
	return s, nil
}
