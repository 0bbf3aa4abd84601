package tpm_test

import (
	"bytes"
	"crypto"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// TestQuoteWhilePCRsMove: kleidi notices an extend between reading the values and
// quoting them only if it concerns a quoted PCR. Then it repeats both.
func TestQuoteWhilePCRsMove(t *testing.T) {
	n := newNode(t)
	for _, c := range []struct {
		pcrs  []int
		times int
		tries int // 0 means that it fails
	}{{[]int{4, 7}, 3, 1}, {[]int{4, 7, 10}, 3, 4}, {[]int{4, 7, 10}, 0, 0}} {
		n.proxy.Forget()
		n.proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCQuote, Times: c.times, Do: extendFirst})
		q, err := (tpm.Quoter{Device: n.Device, Owner: n.Owner}).Quote(t.Context(), nil, []byte("nonce"), crypto.SHA256, c.pcrs)
		if (err == nil) != (c.tries > 0) || err == nil && len(q.PCRs) != len(c.pcrs) {
			t.Errorf("%v: %v", c.pcrs, err)
		}
		if err != nil {
			n.want(err, seal.CauseUnavailable, "PCRs change faster")
		} else if got := n.proxy.Count(tpm2.TPMCCQuote); got != c.tries {
			t.Errorf("%v: %d tries, want %d", c.pcrs, got, c.tries)
		}
		if n.left() != 0 {
			t.Error("a handle is left")
		}
	}
}

// TestReadPCRs: more PCRs than one TPM2_PCR_Read returns, a PCR and a bank that the TPM
// does not have, and a TPM that contradicts itself.
func TestReadPCRs(t *testing.T) {
	n := newNode(t)
	n.must(func(tp transport.TPM) error {
		all := []int{23, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
		values, err := tpm.ReadPCRs(tp, crypto.SHA384, all)
		if err != nil {
			return err
		}
		for _, i := range all {
			one, err := tpm.ReadPCRs(tp, crypto.SHA384, []int{i})
			if err != nil || len(one[i]) != 48 || !bytes.Equal(one[i], values[i]) {
				t.Errorf("PCR %d: %x alone (%v), %x among others", i, one[i], err, values[i])
			}
		}
		return nil
	})
	n.proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCPCRRead, Do: tpmtest.Change(func(r []byte) []byte {
		return append(r[:14:14], 0, 0, 0, 0, 0, 0, 0, 0) // no selection, no values
	})})
	quote := func(pcrs ...int) error {
		_, err := (tpm.Quoter{Device: n.Device, Owner: n.Owner}).Quote(t.Context(), nil, []byte("nonce"), crypto.SHA384, pcrs)
		return err
	}
	n.want(quote(7), seal.CauseUnavailable, "values of PCR [7] are missing, which the TPM has", "makes no sense")
	n.proxy.Heal()
	n.machine.AllocatePart(tpm2.TPMAlgSHA384)
	n.machine.Reboot(n.machine.Current())
	n.want(quote(4, 7, 11), seal.CauseConfiguration, "the TPM's sha384 bank has no PCR [7 11]", "tpm.pcrs")
	n.machine.Allocate(tpm2.TPMAlgSHA256)
	n.machine.Reboot(n.machine.Current())
	n.want(quote(7), seal.CauseConfiguration, "the TPM has no sha384 bank; it has sha256 alone", "set tpm.bank: sha256")
}

// TestEKDigest: the digest is the same for a persistent and for a transient key, before
// and after TPM2_Clear. Somebody else's key at the handle is not mistaken for the
// endorsement key.
func TestEKDigest(t *testing.T) {
	n := newNode(t)
	digest := func() (d string) {
		n.Helper()
		n.must(func(tp transport.TPM) (err error) {
			d, err = tpm.EKDigest(tp)
			return err
		})
		return d
	}
	first := digest()
	if !strings.HasPrefix(first, "sha256:") || len(first) != 71 {
		t.Errorf("%q", first)
	}
	for name, template := range map[string]tpm2.TPMTPublic{"a foreign key": tpm2.RSASRKTemplate, "the key": tpm2.RSAEKTemplate} {
		n.must(func(tp transport.TPM) error { return persistEK(tp, template) })
		if got := digest(); got != first {
			t.Errorf("%s is persistent: %s, was %s", name, got, first)
		}
	}
	if err := n.machine.Clear(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := digest(); got != first {
		t.Errorf("after a clear: %s, was %s", got, first)
	}
}

// persistEK makes a primary key of the endorsement hierarchy persistent at the
// endorsement key's handle.
func persistEK(t transport.TPM, template tpm2.TPMTPublic) error {
	const handle = tpm2.TPMHandle(0x81010001)
	if r, err := (tpm2.ReadPublic{ObjectHandle: handle}).Execute(t); err == nil {
		old := tpm2.NamedHandle{Handle: handle, Name: r.Name}
		if _, err := (tpm2.EvictControl{Auth: ownerHandle(), ObjectHandle: old, PersistentHandle: handle}).Execute(t); err != nil {
			return err
		}
	}
	r, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHEndorsement, InPublic: tpm2.New2B(template)}.Execute(t)
	if err != nil {
		return err
	}
	_, err = tpm2.EvictControl{Auth: ownerHandle(), ObjectHandle: tpm2.NamedHandle{Handle: r.ObjectHandle, Name: r.Name}, PersistentHandle: handle}.Execute(t)
	return err
}
