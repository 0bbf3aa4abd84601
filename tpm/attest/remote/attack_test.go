package remote

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm/attest/exchange"
	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/keys"
	"github.com/beezy-dev/kleidi/tpm/simboot"
)

// TestAttacks: in each row, somebody alters a message, or lies.
func TestAttacks(t *testing.T) {
	r := newRig(t, simboot.Baseline(simboot.UKI))
	other := newRig(t, simboot.Baseline(simboot.UKI)) // another machine with the same boot
	r.verifier.Nodes["beta"] = Registration{EK: ekOf(t, other.machine), BootPolicy: r.verifier.Nodes["alpha"].BootPolicy}
	var kept *Evidence
	unknown := spki(t, ecdsaKey(t).Public())
	r.wire.evidence = func(e *Evidence) { kept = copyOf(e) }
	if err := r.ask(); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		wire  wire
		check Check
		words string
	}{
		"replayed evidence":                      {wire{evidence: func(e *Evidence) { *e = *kept }}, CheckProof, "not on the TPM"},
		"replayed quote":                         {wire{evidence: func(e *Evidence) { e.Attest, e.Signature = kept.Attest, kept.Signature }}, CheckEvidence, "not fresh"},
		"replayed signature":                     {wire{evidence: func(e *Evidence) { e.Signature = kept.Signature }}, CheckEvidence, "quote"},
		"relay from another TLS connection":      {wire{exporter: exporter(2)}, CheckProof, "is intercepting"},
		"the verifier's nonce replaced":          {wire{challenge: func(c *Challenge) { c.Nonce[0] ^= 1 }}, CheckProof, "is intercepting"},
		"the session's nonce replaced":           {wire{hello: func(h *Hello) { h.NonceTPM = make([]byte, SessionNonceSize) }}, CheckProof, "is intercepting"},
		"the SRK's Name replaced":                {wire{hello: func(h *Hello) { h.SRK = make([]byte, exchange.NameSize) }}, CheckProof, "is intercepting"},
		"a proof guessed":                        {wire{evidence: func(e *Evidence) { e.Proof = make([]byte, 32) }}, CheckProof, "not on the TPM"},
		"no proof":                               {wire{evidence: func(e *Evidence) { e.Proof = nil }}, CheckProof, "not on the TPM"},
		"another cluster":                        {wire{hello: func(h *Hello) { h.Cluster = make([]byte, 16) }}, CheckCluster, "is of cluster"},
		"an unknown node":                        {wire{hello: func(h *Hello) { h.Node = "gamma" }}, CheckNode, "not registered"},
		"another key":                            {wire{hello: func(h *Hello) { h.Key = other.attester.Key }}, CheckKey, "another key than this verifier has"},
		"no key":                                 {wire{hello: func(h *Hello) { h.Key = nil }}, CheckMessage, "signing key"},
		"another node's name":                    {wire{hello: func(h *Hello) { h.Node = "beta" }}, CheckEK, "another endorsement key"},
		"an endorsement key that nobody knows":   {wire{hello: func(h *Hello) { h.EK = unknown }}, CheckEK, "another endorsement key"},
		"fewer PCRs":                             {wire{challenge: func(c *Challenge) { c.PCRs = []int{0, 4, 7} }}, CheckEvidence, "not over exactly"},
		"more PCRs":                              {wire{challenge: func(c *Challenge) { c.PCRs = []int{0, 4, 7, 9, 11} }}, CheckEvidence, "not over exactly"},
		"another bank":                           {wire{challenge: func(c *Challenge) { c.Bank = crypto.SHA384 }}, CheckEvidence, "not over exactly"},
		"a PCR value altered":                    {wire{evidence: func(e *Evidence) { e.PCRs[7][0] ^= 1 }}, CheckEvidence, "quote"},
		"an event removed":                       {wire{evidence: func(e *Evidence) { cut(t, e) }}, CheckEvidence, "PCR"},
		"no log":                                 {wire{evidence: func(e *Evidence) { e.FirmwareLog = nil }}, CheckEvidence, "firmware event log"},
		"a userspace log invented":               {wire{evidence: func(e *Evidence) { e.UserspaceLog = []byte("{}") }}, CheckEvidence, "userspace event log"},
		"a firmware log too long":                {wire{evidence: func(e *Evidence) { e.FirmwareLog = make([]byte, MaxLog+1) }}, CheckMessage, "firmware event log"},
		"a userspace log too long":               {wire{evidence: func(e *Evidence) { e.UserspaceLog = make([]byte, MaxLog+1) }}, CheckMessage, "userspace event log"},
		"a quote too long":                       {wire{evidence: func(e *Evidence) { e.Attest = make([]byte, exchange.MaxStatement+1) }}, CheckMessage, "quote"},
		"a signature too long":                   {wire{evidence: func(e *Evidence) { e.Signature = make([]byte, exchange.MaxStatement+1) }}, CheckMessage, "quote's signature"},
		"an attestation key too long":            {wire{hello: func(h *Hello) { h.AK = make([]byte, exchange.MaxKey+1) }}, CheckMessage, "attestation key"},
		"an endorsement key too long":            {wire{hello: func(h *Hello) { h.EK = make([]byte, exchange.MaxKey+1) }}, CheckMessage, "endorsement key"},
		"a certificate too long":                 {wire{hello: func(h *Hello) { h.EKCertificate = make([]byte, exchange.MaxCertificate+1) }}, CheckMessage, "certificate"},
		"no name":                                {wire{hello: func(h *Hello) { h.Node = "" }}, CheckMessage, "node name"},
		"a session nonce of 48 bytes":            {wire{hello: func(h *Hello) { h.NonceTPM = make([]byte, 48) }}, CheckMessage, "session nonce"},
		"a session nonce of 32 bytes":            {wire{hello: func(h *Hello) { h.NonceTPM = make([]byte, 32) }}, CheckMessage, "session nonce"},
		"no session nonce":                       {wire{hello: func(h *Hello) { h.NonceTPM = nil }}, CheckMessage, "session nonce"},
		"an SRK's Name of another size":          {wire{hello: func(h *Hello) { h.SRK = h.SRK[:33] }}, CheckMessage, "storage root key"},
		"an attestation key with a byte behind":  {wire{hello: func(h *Hello) { h.AK = append(h.AK, 0) }}, CheckAK, "not a restricted signing key"},
		"an attestation key that makes no sense": {wire{hello: func(h *Hello) { h.AK = h.AK[:20] }}, CheckAK, "attestation key"},
	} {
		c.wire.verifier = r.verifier
		*r.wire = c.wire
		r.refused(name, r.ask(), c.check, c.words)
	}
	r.accepted("undisturbed, after all of them")
}

// cut removes the last event of PCR 7.
func cut(t *testing.T, e *Evidence) {
	t.Helper()
	log, err := eventlog.Parse(e.FirmwareLog)
	if err != nil {
		t.Fatal(err)
	}
	for i, event := range slices.Backward(log.Events) {
		if event.PCR == 7 {
			log.Events = slices.Delete(log.Events, i, i+1)
			break
		}
	}
	e.FirmwareLog = log.Encode()
}

func spki(t *testing.T, key crypto.PublicKey) []byte {
	t.Helper()
	b, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestOtherBoot: the boot policy refuses a boot with valid evidence.
func TestOtherBoot(t *testing.T) {
	r := newRig(t, simboot.Baseline(simboot.UKI))
	for name, change := range map[string]func(*simboot.Boot){
		"command line": func(b *simboot.Boot) { b.CommandLine += " init=/bin/sh" },
		"initrd":       func(b *simboot.Boot) { b.Initrd = "another" },
		"kernel":       func(b *simboot.Boot) { b.Kernel = "6.13" },
		"Secure Boot":  func(b *simboot.Boot) { b.SecureBoot = false },
	} {
		b := simboot.Baseline(simboot.UKI)
		change(&b)
		r.machine.Reboot(b)
		r.refused(name, r.ask(), CheckBootPolicy, "the boot policy refuses this boot")
	}
	r.machine.Reboot(simboot.Baseline(simboot.UKI))
	r.accepted("as before")
}

// TestAnotherTPM: a machine with a good boot that is not the registered one.
func TestAnotherTPM(t *testing.T) {
	r, other := newRig(t, simboot.Baseline(simboot.UKI)), newRig(t, simboot.Baseline(simboot.UKI))
	other.attester.Channel, other.attester.Key = r.wire, r.attester.Key
	r.refused("another TPM", other.ask(), CheckEK, "another endorsement key")
	// The other machine lends its quote to the registered one, over the right
	// transcript.
	var digest []byte
	var lent *keys.Quote
	r.wire.evidence = func(e *Evidence) {
		a, err := tpm2.Unmarshal[tpm2.TPMSAttest](e.Attest)
		if err != nil {
			t.Fatal(err)
		}
		digest = a.ExtraData.Buffer
		if lent, err = (keys.Quoter{Device: other.machine.TPM()}).Quote(t.Context(), nil, digest, crypto.SHA256, []int{0, 4, 7, 11}); err != nil {
			t.Fatal(err)
		}
		e.Attest, e.Signature, e.PCRs = lent.Attest, lent.Signature, lent.PCRs
	}
	r.refused("a lent quote", r.ask(), CheckEvidence, "quote")
}

// TestAttestationKeyElsewhere: a TPM reveals the secret only if it has the endorsement
// key and holds the attestation key with its private part.
func TestAttestationKeyElsewhere(t *testing.T) {
	r, other := newRig(t, simboot.Baseline(simboot.UKI)), newRig(t, simboot.Baseline(simboot.UKI))
	public := softwareAK(t)
	var hello *Hello
	r.wire.hello = func(h *Hello) { hello = h }
	if err := r.ask(); err != nil {
		t.Fatal(err)
	}
	hello.AK = public
	pending, c, err := r.verifier.Challenge(hello, exporter(1))
	if err != nil {
		t.Fatalf("a key that looks like a TPM's is not told from one yet: %v", err)
	}
	activate := func(on *rig, ak func(tp transport.TPM, srk *keys.SRK, f func(*keys.AK) error) error) error {
		return on.session(func(tp transport.TPM, srk *keys.SRK, _ tpm2.Session) error {
			return ak(tp, srk, func(ak *keys.AK) error {
				return keys.WithEK(tp, func(ek *keys.EK) error {
					_, err := ek.Activate(tp, srk, ak, c.Credential, c.Secret)
					return err
				})
			})
		})
	}
	external := func(tp transport.TPM, _ *keys.SRK, f func(*keys.AK) error) error {
		p, err := tpm2.Unmarshal[tpm2.TPMTPublic](public)
		if err != nil {
			return err
		}
		loaded, err := tpm2.LoadExternal{InPublic: tpm2.New2B(*p), Hierarchy: tpm2.TPMRHNull}.Execute(tp)
		if err != nil {
			t.Errorf("TPM2_LoadExternal: %v", err)
			return err
		}
		defer func() { _, _ = tpm2.FlushContext{FlushHandle: loaded.ObjectHandle}.Execute(tp) }()
		return f(&keys.AK{Handle: loaded.ObjectHandle, Name: loaded.Name, Public: public})
	}
	if err := activate(r, keys.WithAK); err == nil {
		t.Error("the TPM activates for another attestation key")
	}
	if err := activate(r, external); !errors.Is(err, tpm2.TPMRCAuthUnavailable) {
		t.Errorf("with the public part alone: %v", err)
	}
	if err := activate(other, keys.WithAK); err == nil {
		t.Error("another TPM activates")
	}
	r.refused("the attestation key is elsewhere", pending.Prove(make([]byte, 32)), CheckProof, "not on the TPM")
}

// softwareAK returns the public area of a key in software that claims to be a TPM's.
func softwareAK(t *testing.T) []byte {
	t.Helper()
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	point, err := k.PublicKey.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	p := realAK(t)
	p.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{X: tpm2.TPM2BECCParameter{Buffer: point[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: point[33:]}})
	return tpm2.Marshal(p)
}

// realAK returns the public area of an attestation key of some TPM.
func realAK(t *testing.T) tpm2.TPMTPublic {
	t.Helper()
	r := newRig(t, simboot.Baseline(simboot.UKI))
	var p *tpm2.TPMTPublic
	err := r.session(func(tp transport.TPM, srk *keys.SRK, _ tpm2.Session) error {
		return keys.WithAK(tp, srk, func(ak *keys.AK) (err error) {
			p, err = tpm2.Unmarshal[tpm2.TPMTPublic](ak.Public)
			return err
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	return *p
}

// TestAttestationKeyTemplate: only a key with kleidi's template is accepted, so that
// its Name says what the key can do.
func TestAttestationKeyTemplate(t *testing.T) {
	real := realAK(t)
	r := newRig(t, simboot.Baseline(simboot.UKI))
	var hello *Hello
	r.wire.hello = func(h *Hello) { hello = h }
	if err := r.ask(); err != nil {
		t.Fatal(err)
	}
	challenge := func(ak tpm2.TPMTPublic) error {
		h := *hello
		h.AK = tpm2.Marshal(ak)
		_, _, err := r.verifier.Challenge(&h, exporter(1))
		return err
	}
	if err := challenge(real); err != nil {
		t.Fatalf("the template itself: %v", err)
	}
	for name, change := range map[string]func(*tpm2.TPMTPublic){
		"unrestricted":          func(p *tpm2.TPMTPublic) { p.ObjectAttributes.Restricted = false },
		"of no TPM":             func(p *tpm2.TPMTPublic) { p.ObjectAttributes.FixedTPM = false },
		"movable":               func(p *tpm2.TPMTPublic) { p.ObjectAttributes.FixedParent = false },
		"imported":              func(p *tpm2.TPMTPublic) { p.ObjectAttributes.SensitiveDataOrigin = false },
		"a decryption key":      func(p *tpm2.TPMTPublic) { p.ObjectAttributes.Decrypt = true },
		"no signing key":        func(p *tpm2.TPMTPublic) { p.ObjectAttributes.SignEncrypt = false },
		"no password":           func(p *tpm2.TPMTPublic) { p.ObjectAttributes.UserWithAuth = false },
		"administered by terms": func(p *tpm2.TPMTPublic) { p.ObjectAttributes.AdminWithPolicy = true },
		"with terms":            func(p *tpm2.TPMTPublic) { p.AuthPolicy.Buffer = make([]byte, 32) },
		"named by SHA-384":      func(p *tpm2.TPMTPublic) { p.NameAlg = tpm2.TPMAlgSHA384 },
		"a scheme of choice": func(p *tpm2.TPMTPublic) {
			p.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{CurveID: tpm2.TPMECCNistP256})
		},
		"RSA": func(p *tpm2.TPMTPublic) {
			p.Type = tpm2.TPMAlgRSA
			p.Parameters = tpm2.NewTPMUPublicParms(tpm2.TPMAlgRSA, &tpm2.TPMSRSAParms{KeyBits: 2048})
			p.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: make([]byte, 256)})
		},
	} {
		p := real
		change(&p)
		r.refused(name, challenge(p), CheckAK, "")
	}
}

// TestStorageRootKeyElsewhere: an attester that names a storage root key which is not
// the parent of its attestation key is refused, even if it names that key everywhere.
func TestStorageRootKeyElsewhere(t *testing.T) {
	r := newRig(t, simboot.Baseline(simboot.UKI))
	err := r.session(func(tp transport.TPM, srk *keys.SRK, s tpm2.Session) error {
		return keys.WithAK(tp, srk, func(ak *keys.AK) error {
			return keys.WithEK(tp, func(ek *keys.EK) error {
				lie := *srk
				lie.Name.Buffer = append([]byte{0, 0x0b}, make([]byte, 32)...)
				_, err := r.attester.exchange(t.Context(), &exchange.Machine{TPM: tp, SRK: &lie, AK: ak, EK: ek}, s.NonceTPM().Buffer)
				return err
			})
		})
	})
	r.refused("another storage root key", err, CheckSRK, "is not a child of it")
}

// TestEKCertificate: if certificates are demanded, a node whose certificate does not
// verify is refused, registered or not.
func TestEKCertificate(t *testing.T) {
	r := newRig(t, simboot.Baseline(simboot.UKI))
	var got []byte
	r.verifier.EKCertificate = func(certificate, key []byte) error {
		if keys.EKDigestOf(key) != r.verifier.Nodes["alpha"].EK {
			t.Error("it is asked about another key")
		}
		if got = certificate; len(certificate) == 0 {
			return errors.New("no certificate")
		}
		return nil
	}
	r.refused("none", r.ask(), CheckEKCertificate, "no certificate")
	want := make([]byte, 1300) // more than one TPM2_NV_Read returns
	rand.Read(want)
	storeCertificate(t, r, want)
	r.accepted("with a certificate")
	if string(got) != string(want) {
		t.Errorf("a certificate of %d bytes arrived, want %d", len(got), len(want))
	}
}

func storeCertificate(t *testing.T, r *rig, certificate []byte) {
	t.Helper()
	err := r.machine.TPM().Do(t.Context(), func(tp transport.TPM) error {
		public := tpm2.TPMSNVPublic{NVIndex: 0x01c00002, NameAlg: tpm2.TPMAlgSHA256, DataSize: uint16(len(certificate)),
			Attributes: tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, AuthRead: true, NoDA: true, NT: tpm2.TPMNTOrdinary}}
		if _, err := (tpm2.NVDefineSpace{AuthHandle: tpm2.TPMRHOwner, PublicInfo: tpm2.New2B(public)}).Execute(tp); err != nil {
			return err
		}
		name, err := tpm2.NVName(&public)
		if err != nil {
			return err
		}
		for offset := 0; offset < len(certificate); offset += 512 {
			index := tpm2.NamedHandle{Handle: public.NVIndex, Name: *name}
			if _, err := (tpm2.NVWrite{AuthHandle: tpm2.TPMRHOwner, NVIndex: index, Offset: uint16(offset),
				Data: tpm2.TPM2BMaxNVBuffer{Buffer: certificate[offset:min(offset+512, len(certificate))]}}).Execute(tp); err != nil {
				return err
			}
			if !public.Attributes.Written {
				public.Attributes.Written = true
				if name, err = tpm2.NVName(&public); err != nil {
					return err
				}
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestHostileChallenges: the attester answers no malformed challenge.
func TestHostileChallenges(t *testing.T) {
	r := newRig(t, simboot.Baseline(simboot.UKI))
	for name, change := range map[string]func(*Challenge){
		"no nonce": func(c *Challenge) { c.Nonce = nil }, "a long nonce": func(c *Challenge) { c.Nonce = make([]byte, 64) },
		"no PCRs": func(c *Challenge) { c.PCRs = nil }, "PCR 24": func(c *Challenge) { c.PCRs = []int{24} }, "PCR -1": func(c *Challenge) { c.PCRs = []int{-1} },
		"PCRs twice": func(c *Challenge) { c.PCRs = []int{4, 4} }, "descending": func(c *Challenge) { c.PCRs = []int{7, 4} }, "many": func(c *Challenge) { c.PCRs = make([]int, 25) },
		"SHA-1": func(c *Challenge) { c.Bank = crypto.SHA1 }, "no bank": func(c *Challenge) { c.Bank = 0 },
		"no credential": func(c *Challenge) { c.Credential = nil }, "a long credential": func(c *Challenge) { c.Credential = make([]byte, exchange.MaxCredential+1) },
		"no secret": func(c *Challenge) { c.Secret = nil }, "a long secret": func(c *Challenge) { c.Secret = make([]byte, exchange.MaxCredential+1) },
	} {
		*r.wire = wire{verifier: r.verifier, challenge: change}
		if err := r.ask(); seal.CauseOf(err) != seal.CauseUnavailable || !strings.Contains(err.Error(), "the verifier's challenge") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
