package tpm_test

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/ekcert"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

const (
	rsaIndex  = tpm2.TPMHandle(0x01c00002)
	p256Index = tpm2.TPMHandle(0x01c0000a)
	p384Index = tpm2.TPMHandle(0x01c00016)
)

var (
	byAuth  = tpm2.TPMANV{OwnerWrite: true, AuthRead: true, OwnerRead: true, NoDA: true}
	byOwner = tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, NoDA: true}
	byNone  = tpm2.TPMANV{OwnerWrite: true, PolicyRead: true, NoDA: true}
)

// store writes what a TPM's maker would have left in an index; nil leaves it
// unwritten.
func store(t *testing.T, m *tpmtest.Machine, index tpm2.TPMHandle, attributes tpm2.TPMANV, size int, content []byte) {
	t.Helper()
	err := m.TPM().Do(t.Context(), func(tp transport.TPM) error {
		public := tpm2.TPMSNVPublic{NVIndex: index, NameAlg: tpm2.TPMAlgSHA256, Attributes: attributes, DataSize: uint16(size)}
		if _, err := (tpm2.NVDefineSpace{AuthHandle: ownerHandle(), PublicInfo: tpm2.New2B(public)}).Execute(tp); err != nil {
			return err
		}
		for at := 0; at < len(content); at += 512 {
			r, err := tpm2.NVReadPublic{NVIndex: index}.Execute(tp) // its Name changes with the first write
			if err != nil {
				return err
			}
			block := content[at:min(at+512, len(content))]
			write := tpm2.NVWrite{AuthHandle: ownerHandle(), NVIndex: tpm2.NamedHandle{Handle: index, Name: r.NVName},
				Data: tpm2.TPM2BMaxNVBuffer{Buffer: block}, Offset: uint16(at)}
			if _, err := write.Execute(tp); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// maker returns an EK's certificate and the bundle that vouches for it.
func maker(t *testing.T, ek crypto.PublicKey) (der []byte, bundle *ekcert.Bundle) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	from, to := time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "maker"}, NotBefore: from, NotAfter: to,
		BasicConstraintsValid: true, IsCA: true, KeyUsage: x509.KeyUsageCertSign}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), NotBefore: from, NotAfter: to, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageKeyEncipherment, UnknownExtKeyUsage: []asn1.ObjectIdentifier{{2, 23, 133, 8, 1}}}
	if der, err = x509.CreateCertificate(rand.Reader, leaf, ca, ek, key); err != nil {
		t.Fatal(err)
	}
	bundle, err = ekcert.LoadBundle(fstest.MapFS{"maker.pem": {Data: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: caDER})}})
	if err != nil {
		t.Fatal(err)
	}
	return der, bundle
}

func endorsementKey(t *testing.T, m *tpmtest.Machine) (ek crypto.PublicKey) {
	t.Helper()
	err := m.TPM().Do(t.Context(), func(tp transport.TPM) error {
		return tpm.WithEK(tp, func(k *tpm.EK) (err error) {
			ek, err = tpm2.Pub(k.Public)
			return err
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	return ek
}

// TestEKCertificates: what the maker left is found, padding and all, and
// verifies; what was never left or written is no error.
func TestEKCertificates(t *testing.T) {
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	if found, err := m.TPM().EKCertificates(t.Context(), tpm.Owner{}); err != nil || len(found) != 0 {
		t.Fatalf("on a TPM without any: %v, %v", found, err)
	}
	ek := endorsementKey(t, m)
	der, bundle := maker(t, ek)
	padded := append(bytes.Clone(der), make([]byte, 1500-len(der))...)
	store(t, m, rsaIndex, byAuth, len(padded), padded)
	store(t, m, p256Index, byAuth, 1000, nil)
	store(t, m, p384Index, byOwner, 700, bytes.Repeat([]byte{7}, 700))
	found, err := m.TPM().EKCertificates(t.Context(), tpm.Owner{})
	if err != nil || len(found) != 2 {
		t.Fatalf("%d found, %v", len(found), err)
	}
	if c := found[0]; c.Key != "RSA-2048" || c.Index != uint32(rsaIndex) || !bytes.Equal(c.UntrustedDER, padded) {
		t.Errorf("%s, %#x, %d bytes", c.Key, c.Index, len(c.UntrustedDER))
	}
	if c := found[1]; c.Key != "P-384" || c.Index != uint32(p384Index) || !bytes.Equal(c.UntrustedDER, bytes.Repeat([]byte{7}, 700)) {
		t.Errorf("%s, %#x, %d bytes", c.Key, c.Index, len(c.UntrustedDER))
	}
	v, err := bundle.Verify(found[0].UntrustedDER, ek, time.Now())
	if err != nil || !slices.Equal(v.Quirks, []string{"padding"}) {
		t.Errorf("%v", err)
	}
	if _, err := bundle.Verify(found[1].UntrustedDER, ek, time.Now()); err == nil {
		t.Error("sevens verify")
	}
	digest, err := ekcert.Digest(ek)
	if err != nil {
		t.Fatal(err)
	}
	err = m.TPM().Do(t.Context(), func(tp transport.TPM) error {
		known, err := tpm.EKDigest(tp)
		if known != digest {
			t.Errorf("the node is known by %s, the allow-list by %s", known, digest)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestEKCertificatesByOwner: an index that only the owner may read is read with
// the owner authorization.
func TestEKCertificatesByOwner(t *testing.T) {
	const secret = "owner's secret"
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	store(t, m, p256Index, byOwner, 600, bytes.Repeat([]byte{7}, 600))
	store(t, m, p384Index, byAuth, 600, bytes.Repeat([]byte{8}, 600))
	err := m.TPM().Do(t.Context(), func(tp transport.TPM) error {
		_, err := tpm2.HierarchyChangeAuth{AuthHandle: ownerHandle(), NewAuth: tpm2.TPM2BAuth{Buffer: []byte(secret)}}.Execute(tp)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "owner")
	if err := os.WriteFile(file, []byte(secret), 0o600); err != nil {
		t.Fatal(err)
	}
	if found, err := m.TPM().EKCertificates(t.Context(), tpm.Owner{File: file}); err != nil || len(found) != 2 || found[0].UntrustedDER[0] != 7 {
		t.Errorf("%d found, %v", len(found), err)
	}
	found, err := m.TPM().EKCertificates(t.Context(), tpm.Owner{})
	if seal.CauseOf(err) != seal.CauseCredentials || len(found) != 1 || found[0].Key != "P-384" {
		t.Errorf("without the owner authorization: %d found, %v", len(found), err)
	}
}

// TestEKCertificatesUnreadable: an index that can't be read is named, and hides no
// other.
func TestEKCertificatesUnreadable(t *testing.T) {
	counter := byAuth
	counter.NT = tpm2.TPMNTCounter
	for name, c := range map[string]struct {
		attributes tpm2.TPMANV
		says       string
		fault      tpmtest.Fault
	}{
		"read by nobody":      {attributes: byNone, says: "neither its own nor the owner's"},
		"a counter":           {attributes: counter, says: "it holds no certificate"},
		"read refused":        {byAuth, "TPM2_NV_Read: ", tpmtest.Fault{On: tpm2.TPMCCNVRead, Times: 1, Do: tpmtest.Code(tpm2.TPMRCNVLocked)}},
		"second read refused": {byAuth, "TPM2_NV_Read: ", tpmtest.Fault{On: tpm2.TPMCCNVRead, After: 1, Times: 1, Do: tpmtest.Code(tpm2.TPMRCNVLocked)}},
		"look refused":        {byAuth, "TPM2_NV_ReadPublic: ", tpmtest.Fault{On: tpm2.TPMCCNVReadPublic, Times: 1, Do: tpmtest.Code(tpm2.TPMRCFailure)}},
		"too little":          {byAuth, "TPM2_NV_Read: 511 bytes, want 512", tpmtest.Fault{On: tpm2.TPMCCNVRead, Times: 1, Do: tpmtest.Change(oneLess)}},
		"too large":           {byAuth, "9000 bytes of type 0, want at most 8192", tpmtest.Fault{On: tpm2.TPMCCNVReadPublic, Times: 1, Do: tpmtest.Change(claim9000)}},
	} {
		t.Run(name, func(t *testing.T) {
			m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
			size := 600
			if c.attributes.NT == tpm2.TPMNTCounter {
				size = 8
			}
			var content []byte
			if c.attributes.NT == tpm2.TPMNTOrdinary {
				content = bytes.Repeat([]byte{7}, size)
			}
			store(t, m, rsaIndex, c.attributes, size, content)
			if content == nil {
				increment(t, m, rsaIndex)
			}
			store(t, m, p256Index, byAuth, 600, bytes.Repeat([]byte{8}, 600))
			proxy := tpmtest.NewProxy(t, m)
			if c.fault.Do != nil {
				proxy.Inject(c.fault)
			}
			found, err := proxy.TPM(0).EKCertificates(t.Context(), tpm.Owner{})
			if err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "RSA-2048 endorsement key certificate in NV index 0x01c00002") {
				t.Errorf("%v, want %q", err, c.says)
			}
			if len(found) != 1 || found[0].Key != "P-256" {
				t.Errorf("found %v", found)
			}
		})
	}
}

func increment(t *testing.T, m *tpmtest.Machine, index tpm2.TPMHandle) {
	t.Helper()
	err := m.TPM().Do(t.Context(), func(tp transport.TPM) error {
		r, err := tpm2.NVReadPublic{NVIndex: index}.Execute(tp)
		if err != nil {
			return err
		}
		_, err = tpm2.NVIncrement{AuthHandle: ownerHandle(), NVIndex: tpm2.NamedHandle{Handle: index, Name: r.NVName}}.Execute(tp)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// oneLess takes a byte of the data away, which follow the header, the size of the
// parameters and their own size.
func oneLess(response []byte) []byte {
	const parameters, data = 10, 14
	binary.BigEndian.PutUint32(response[parameters:], binary.BigEndian.Uint32(response[parameters:])-1)
	binary.BigEndian.PutUint16(response[data:], binary.BigEndian.Uint16(response[data:])-1)
	return slices.Delete(response, data+2, data+3)
}

// claim9000 alters the size of an index' public area: the last field, before the Name.
func claim9000(response []byte) []byte {
	const header = 10
	size := int(binary.BigEndian.Uint16(response[header:]))
	binary.BigEndian.PutUint16(response[header+size:], 9000)
	return response
}
