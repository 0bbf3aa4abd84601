package main

import (
	"crypto"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"strings"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/beezy-dev/kleidi/grpcserver/verifier"
	"github.com/beezy-dev/kleidi/internal/verifierd"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/attest/remote"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/bootstate"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/keys"
)

// ask makes the machine's TPM demand the signature of the verifier at $SECOND, in a
// separate session: ask NODE REPORT, where REPORT is the output of kleidi verifier show
// -o json. A refusal can then be matched as stderr.
func (h *host) ask(ts *testscript.TestScript, args []string) error {
	if len(args) != 2 {
		return broken("ask NODE REPORT")
	}
	b, err := os.ReadFile(h.abs(args[1]))
	if err != nil {
		return broken("%w", err)
	}
	var report verifierd.Report
	if err := json.Unmarshal(b, &report); err != nil {
		return broken("%w", err)
	}
	channel, err := verifier.NewClient(verifier.ClientConfig{Address: ts.Getenv("SECOND"), Certificate: report.Certificate})
	if err != nil {
		return broken("%w", err)
	}
	cluster, err := seal.ParseClusterID(report.ClusterID)
	if err != nil {
		return broken("%w", err)
	}
	if err := h.listening(ts.Getenv("SECOND")); err != nil {
		return err
	}
	a := &remote.Attester{Cluster: cluster, Node: args[0], Channel: channel, Logs: func(crypto.Hash, eventlog.PCRs) (firmware, userspace []byte, err error) {
		firmware, err = os.ReadFile(h.machine.EventLog())
		return firmware, nil, err
	}}
	// The verifier gives a connection 3 s to say hello, which a busy machine may exceed.
	cutOff := func(said string) bool {
		return strings.Contains(said, "check that kleidi verifier runs") && !strings.Contains(said, "can't write its audit log")
	}
	err = whileBusy(cutOff, func() error { return h.satisfy(a, report.PublicKey) })
	if err != nil {
		fmt.Fprintln(ts.Stderr(), err)
	}
	return err
}

// listening waits until somebody listens at address.
func (h *host) listening(address string) error {
	return eventually(func() error {
		c, err := net.Dial("tcp", address)
		if err != nil {
			return err
		}
		return c.Close()
	})
}

// satisfy opens a session as for a slot, and lets the attester satisfy its term.
func (h *host) satisfy(a *remote.Attester, publicKey string) error {
	key, err := bootstate.ParsePublicKey([]byte(publicKey))
	if err != nil {
		return broken("%w", err)
	}
	public, err := authpolicy.PublicKey(key)
	if err != nil {
		return broken("%w", err)
	}
	if a.Key, err = authpolicy.Name(public); err != nil {
		return broken("%w", err)
	}
	return h.machine.TPM().Do(h.t.Context(), func(t transport.TPM) error {
		return keys.WithSRK(t, keys.Owner{}, nil, func(srk *keys.SRK) error {
			s, done, err := tpm2.PolicySession(t, tpm2.TPMAlgSHA256, authpolicy.NonceSize, tpm2.Salted(srk.Handle, srk.Public), tpm2.AESEncryption(128, tpm2.EncryptOut))
			if err != nil {
				return err
			}
			defer func() { _ = done() }()
			return authpolicy.Terms{authpolicy.Signed{Key: public, Ref: remote.PolicyRef(a.Cluster, a.Node), Sign: func(nonceTPM []byte) (tpm2.TPMTSignature, error) {
				return a.Sign(h.t.Context(), t, srk, nonceTPM)
			}}}.Satisfy(t, s)
		})
	})
}
