package keys_test

import (
	"bytes"
	"crypto"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/internal/nodetest"
	"github.com/beezy-dev/kleidi/tpm/keys"
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
		n.Proxy.Forget()
		n.Proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCQuote, Times: c.times, Do: nodetest.ExtendFirst})
		q, err := (keys.Quoter{Device: n.Device, Owner: n.Owner}).Quote(t.Context(), nil, []byte("nonce"), crypto.SHA256, c.pcrs)
		if (err == nil) != (c.tries > 0) || err == nil && len(q.PCRs) != len(c.pcrs) {
			t.Errorf("%v: %v", c.pcrs, err)
		}
		if err != nil {
			n.Want(err, seal.CauseUnavailable, "PCRs change faster")
		} else if got := n.Proxy.Count(tpm2.TPMCCQuote); got != c.tries {
			t.Errorf("%v: %d tries, want %d", c.pcrs, got, c.tries)
		}
		if n.Left() != 0 {
			t.Error("a handle is left")
		}
	}
}

// TestReadPCRs: more PCRs than one TPM2_PCR_Read returns, a PCR and a bank that the TPM
// does not have, and a TPM that contradicts itself.
func TestReadPCRs(t *testing.T) {
	n := newNode(t)
	n.Must(func(tp transport.TPM) error {
		all := []int{23, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
		values, err := keys.ReadPCRs(tp, crypto.SHA384, all)
		if err != nil {
			return err
		}
		for _, i := range all {
			one, err := keys.ReadPCRs(tp, crypto.SHA384, []int{i})
			if err != nil || len(one[i]) != 48 || !bytes.Equal(one[i], values[i]) {
				t.Errorf("PCR %d: %x alone (%v), %x among others", i, one[i], err, values[i])
			}
		}
		return nil
	})
	n.Proxy.Inject(tpmtest.Fault{On: tpm2.TPMCCPCRRead, Do: tpmtest.Change(func(r []byte) []byte {
		return append(r[:14:14], 0, 0, 0, 0, 0, 0, 0, 0) // no selection, no values
	})})
	quote := func(pcrs ...int) error {
		_, err := (keys.Quoter{Device: n.Device, Owner: n.Owner}).Quote(t.Context(), nil, []byte("nonce"), crypto.SHA384, pcrs)
		return err
	}
	n.Want(quote(7), seal.CauseUnavailable, "values of PCR [7] are missing, which the TPM has", "makes no sense")
	n.Proxy.Heal()
	n.Machine.AllocatePart(tpm2.TPMAlgSHA384)
	n.Machine.Reboot(n.Machine.Current())
	n.Want(quote(4, 7, 11), seal.CauseConfiguration, "the TPM's sha384 bank has no PCR [7 11]", "tpm.pcrs")
	n.Machine.Allocate(tpm2.TPMAlgSHA256)
	n.Machine.Reboot(n.Machine.Current())
	n.Want(quote(7), seal.CauseConfiguration, "the TPM has no sha384 bank; it has sha256 alone", "set tpm.bank: sha256")
}

// TestEKDigest: the digest is the same for a persistent and for a transient key, before
// and after TPM2_Clear. Somebody else's key at the handle is not mistaken for the
// endorsement key.
func TestEKDigest(t *testing.T) {
	n := newNode(t)
	digest := func() (d string) {
		n.Helper()
		n.Must(func(tp transport.TPM) (err error) {
			d, err = keys.EKDigest(tp)
			return err
		})
		return d
	}
	first := digest()
	if !strings.HasPrefix(first, "sha256:") || len(first) != 71 {
		t.Errorf("%q", first)
	}
	for name, template := range map[string]tpm2.TPMTPublic{"a foreign key": tpm2.RSASRKTemplate, "the key": tpm2.RSAEKTemplate} {
		n.Must(func(tp transport.TPM) error { return persistEK(tp, template) })
		if got := digest(); got != first {
			t.Errorf("%s is persistent: %s, was %s", name, got, first)
		}
	}
	if err := n.Machine.Clear(t.Context()); err != nil {
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
		if _, err := (tpm2.EvictControl{Auth: nodetest.OwnerHandle(), ObjectHandle: old, PersistentHandle: handle}).Execute(t); err != nil {
			return err
		}
	}
	r, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.TPMRHEndorsement, InPublic: tpm2.New2B(template)}.Execute(t)
	if err != nil {
		return err
	}
	_, err = tpm2.EvictControl{Auth: nodetest.OwnerHandle(), ObjectHandle: tpm2.NamedHandle{Handle: r.ObjectHandle, Name: r.Name}, PersistentHandle: handle}.Execute(t)
	return err
}
