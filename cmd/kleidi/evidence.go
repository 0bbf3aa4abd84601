package main

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/beezy-dev/kleidi/tpm/attest"
	"github.com/beezy-dev/kleidi/tpm/bootpolicy"
)

// Sizes of a nonce, in bytes: the smallest that can't be guessed, and what a TPM takes.
const (
	minNonce = 16
	maxNonce = 64
)

func (a *app) newPolicyEvidence() *cobra.Command {
	var file, nonce string
	var pcrs []int
	cmd := &cobra.Command{
		Use:   "evidence --file FILE",
		Short: "Save a fresh quote and the event log of the running boot, for a verifier",
		Long: `Save a fresh quote and the event log of the running boot as an Attestation of go-tpm-tools
(protobuf). kleidi bootpolicy check judges it, and so can others' verifiers. Whoever wants
to know that it is fresh chooses the nonce.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			fresh, err := parseNonce(nonce)
			if err != nil {
				return err
			}
			n, err := a.node()
			if err != nil {
				return err
			}
			if pcrs, err = n.recordedPCRs(pcrs); err != nil {
				return requireRoot(fmt.Errorf("evidence: %w", err))
			}
			e, err := n.gate.Collect(cmd.Context(), nil, fresh, n.cfg.Bank(), pcrs)
			if err == nil {
				_, err = attest.Verify(e, fresh, n.cfg.Bank(), pcrs)
			}
			if err != nil {
				return requireRoot(fmt.Errorf("evidence: %w", err))
			}
			b, err := e.Marshal()
			if err == nil {
				err = writeNew(file, b)
			}
			if err != nil {
				return fmt.Errorf("evidence: %w", err)
			}
			result := map[string]any{"file": file, "bank": n.cfg.TPM.Bank, "pcrs": pcrs, "nonce": hex.EncodeToString(fresh), "attestationKey": keyDigest(e)}
			return a.show(cmd.OutOrStdout(), result, func(w io.Writer) {
				fmt.Fprintf(w, "quote over PCR %s (%s) with nonce %x, and the event log, written to %s\n", join(pcrs), n.cfg.TPM.Bank, fresh, file)
			})
		},
	}
	cmd.Flags().StringVar(&file, "file", "", "new file to write to")
	cmd.Flags().StringVar(&nonce, "nonce", "", "the verifier's nonce, 16 to 64 bytes in hexadecimal; a random one if empty")
	cmd.Flags().IntSliceVar(&pcrs, "pcrs", nil, "the PCRs to quote (default: 0 and those that kleidi seals to)")
	_ = cmd.MarkFlagRequired("file")
	return cmd
}

// parseNonce returns a random nonce for an empty text.
func parseNonce(s string) ([]byte, error) {
	if s == "" {
		b := make([]byte, 32)
		rand.Read(b)
		return b, nil
	}
	b, err := hex.DecodeString(s)
	if err != nil || len(b) < minNonce || len(b) > maxNonce {
		return nil, fmt.Errorf("--nonce: want %d to %d bytes in hexadecimal, such as openssl rand -hex 32 prints", minNonce, maxNonce)
	}
	return b, nil
}

// keyDigest names an attestation key.
func keyDigest(e *attest.Evidence) string {
	return fmt.Sprintf("sha256:%x", sha256.Sum256(e.Quote.AKPublic))
}

// evidenceVerdict is a verdict on saved evidence, and what the evidence can't prove.
type evidenceVerdict struct {
	*bootpolicy.Verdict
	// AttestationKey is the SHA-256 digest of the key's public area.
	AttestationKey string `json:"attestationKey"`
	// Fresh says that the quote is over the nonce that was given.
	Fresh bool `json:"fresh"`
}

func judgeEvidence(policy, file, nonce string) (*evidenceVerdict, error) {
	p, err := readPolicy(policy)
	if err != nil {
		return nil, err
	}
	b, err := readFile(file, attest.MaxEvidence)
	if err != nil {
		return nil, err
	}
	e, err := attest.ParseEvidence(b, p.Hash())
	if err != nil {
		return nil, fmt.Errorf("%s: %w; want what kleidi bootpolicy evidence writes", file, err)
	}
	said, err := e.Nonce()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	if nonce != "" {
		want, err := parseNonce(nonce)
		if err != nil {
			return nil, err
		}
		if !bytes.Equal(want, said) {
			return nil, fmt.Errorf("%s: the quote was not made for this nonce; ask for evidence with --nonce %s", file, nonce)
		}
	}
	r, err := attest.Verify(e, said, p.Hash(), p.Demanded())
	if err != nil {
		return nil, fmt.Errorf("%s: %w; ask for fresh evidence over PCR %s (%s), and if it stays the machine or the file was tampered with", file, err, join(p.Demanded()), p.Bank)
	}
	return &evidenceVerdict{bootpolicy.Judge(p, r.Log, r.PCRs), keyDigest(e), nonce != ""}, nil
}

func printEvidence(w io.Writer, v *evidenceVerdict) {
	if v.Accepted {
		fmt.Fprintln(w, "accepted, as quoted by attestation key "+v.AttestationKey)
		fmt.Fprintln(w, "the file does not prove in which TPM that key is")
		if !v.Fresh {
			fmt.Fprintln(w, "the file does not prove when it was quoted: no nonce was given with --nonce")
		}
	}
	printFindings(w, v.Verdict)
}

var errRefusedBoot = errors.New("the boot policy refuses this boot; see what changed with kleidi bootpolicy explain, and docs/boot-policy.md")
