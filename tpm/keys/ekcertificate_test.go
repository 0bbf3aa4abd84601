package keys_test

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
	"slices"
	"testing"
	"testing/fstest"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/tpm/device"
	"github.com/beezy-dev/kleidi/tpm/ekcert"
	"github.com/beezy-dev/kleidi/tpm/internal/nodetest"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

const rsaIndex = tpm2.TPMHandle(0x01c00002)

var (
	byAuth  = tpm2.TPMANV{OwnerWrite: true, AuthRead: true, OwnerRead: true, NoDA: true}
	byOwner = tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, NoDA: true}
	byNone  = tpm2.TPMANV{OwnerWrite: true, PolicyRead: true, NoDA: true}
)

// store writes to an index what a TPM's maker would write; nil leaves the index
// unwritten.
func store(t *testing.T, m *tpmtest.Machine, index tpm2.TPMHandle, attributes tpm2.TPMANV, size int, content []byte) {
	t.Helper()
	err := m.TPM().Do(t.Context(), func(tp transport.TPM) error {
		public := tpm2.TPMSNVPublic{NVIndex: index, NameAlg: tpm2.TPMAlgSHA256, Attributes: attributes, DataSize: uint16(size)}
		if _, err := (tpm2.NVDefineSpace{AuthHandle: nodetest.OwnerHandle(), PublicInfo: tpm2.New2B(public)}).Execute(tp); err != nil {
			return err
		}
		for at := 0; at < len(content); at += 512 {
			r, err := tpm2.NVReadPublic{NVIndex: index}.Execute(tp) // its Name changes with the first write
			if err != nil {
				return err
			}
			block := content[at:min(at+512, len(content))]
			write := tpm2.NVWrite{AuthHandle: nodetest.OwnerHandle(), NVIndex: tpm2.NamedHandle{Handle: index, Name: r.NVName},
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
		return keys.WithEK(tp, func(k *keys.EK) (err error) {
			ek, err = tpm2.Pub(k.Public)
			return err
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	return ek
}

// certificate returns what [keys.EKCertificate] finds.
func certificate(t *testing.T, d *device.Device) (der []byte) {
	t.Helper()
	err := d.Do(t.Context(), func(tp transport.TPM) error {
		return keys.WithEK(tp, func(ek *keys.EK) error {
			der = keys.EKCertificate(tp, ek)
			return nil
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// TestEKCertificate: the maker's certificate is found, including padding, and verifies.
func TestEKCertificate(t *testing.T) {
	m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
	if der := certificate(t, m.TPM()); der != nil {
		t.Fatalf("on a TPM without any: %x", der)
	}
	ek := endorsementKey(t, m)
	der, bundle := maker(t, ek)
	padded := append(bytes.Clone(der), make([]byte, 1500-len(der))...)
	store(t, m, rsaIndex, byAuth, len(padded), padded)
	found := certificate(t, m.TPM())
	if !bytes.Equal(found, padded) {
		t.Errorf("%d bytes, want the %d that were stored", len(found), len(padded))
	}
	v, err := bundle.Verify(found, ek, time.Now())
	if err != nil || !slices.Equal(v.Quirks, []string{"padding"}) {
		t.Errorf("%v", err)
	}
}

// TestEKCertificateUnreadable: a certificate that can't be read completely counts as
// none.
func TestEKCertificateUnreadable(t *testing.T) {
	stored := bytes.Repeat([]byte{7}, 600)
	for name, c := range map[string]struct {
		attributes tpm2.TPMANV
		content    []byte
		fault      tpmtest.Fault
	}{
		"read by the owner alone": {attributes: byOwner, content: stored},
		"read by nobody":          {attributes: byNone, content: stored},
		"never written":           {attributes: byAuth},
		"read refused":            {byAuth, stored, tpmtest.Fault{On: tpm2.TPMCCNVRead, Times: 1, Do: tpmtest.Code(tpm2.TPMRCNVLocked)}},
		"second read refused":     {byAuth, stored, tpmtest.Fault{On: tpm2.TPMCCNVRead, After: 1, Times: 1, Do: tpmtest.Code(tpm2.TPMRCNVLocked)}},
		"look refused":            {byAuth, stored, tpmtest.Fault{On: tpm2.TPMCCNVReadPublic, Times: 1, Do: tpmtest.Code(tpm2.TPMRCFailure)}},
		"too little":              {byAuth, stored, tpmtest.Fault{On: tpm2.TPMCCNVRead, Times: 1, Do: tpmtest.Change(oneLess)}},
		"too large":               {byAuth, stored, tpmtest.Fault{On: tpm2.TPMCCNVReadPublic, Times: 1, Do: tpmtest.Change(claim9000)}},
	} {
		t.Run(name, func(t *testing.T) {
			m := tpmtest.New(t, simboot.Baseline(simboot.UKI))
			store(t, m, rsaIndex, c.attributes, len(stored), c.content)
			proxy := tpmtest.NewProxy(t, m)
			if c.fault.Do != nil {
				proxy.Inject(c.fault)
			}
			if der := certificate(t, proxy.TPM(0)); der != nil {
				t.Errorf("%d bytes, want none", len(der))
			}
		})
	}
}

// oneLess drops one byte of the data, which follows the header, the size of the
// parameters and its own size.
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
