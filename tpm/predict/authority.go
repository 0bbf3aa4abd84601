package predict

import (
	"bytes"
	"crypto"
	"crypto/x509"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// authority is an event of PCR 7 that says which certificate let an image run.
type authority struct {
	at   int
	name string
	data []byte // the owner's GUID and the certificate
	cert *x509.Certificate
}

// authorities returns the authorities that the log has after the separator. It refuses an
// event of an unknown form, and an event whose digests do not prove its data.
func (d *draft) authorities() ([]authority, error) {
	var all []authority
	late, after := userspace(d.old), false
	for _, i := range d.indexes(7, anyEvent) {
		e := d.old.Events[i]
		switch v, ok := parseVariable(e.UntrustedData); {
		case !after:
			after = e.Proves([]byte{0, 0, 0, 0})
		case i >= late && provesItself(e):
		case !provesItself(e) || !ok || e.UntrustedType != eventlog.EFIVariableAuthority:
			return nil, refuse(7, "%s: not a proven authority", where(i, e))
		case v.name == "SbatLevel":
		default:
			c, err := x509.ParseCertificate(v.data[min(16, len(v.data)):])
			if err != nil { // the entry is a hash, or nothing that Go can read
				c = nil
			}
			all = append(all, authority{i, v.name, v.data, c})
		}
	}
	return all, nil
}

// authorised refuses an image for which PCR 7 would have another authority, or none. loader
// is the event of the image that loaded it, or -1; at is its own event.
//
// Firmware tries an image's signatures in their order, each with the certificates of db in
// their order, and measures the first certificate that fits, once per boot. shim does the
// same with db, and then with its own lists. So the authority of the new image must be the
// one that was measured for the present image. If none was measured for the present image,
// because an earlier image had the same one, it must be an authority of an earlier image.
func (d *draft) authorised(img *image, loader, at int) error {
	measured, err := d.authorities()
	if err != nil {
		return err
	}
	next, err := d.authorityOf(img, measured, loader >= 0)
	if err != nil {
		return err
	}
	var own, earlier []authority
	for _, a := range measured {
		switch {
		case a.at > at:
		case a.at > loader:
			own = append(own, a)
		default:
			earlier = append(earlier, a)
		}
	}
	if len(own) == 0 {
		own = earlier
	} else if len(own) > 1 {
		return refuse(7, "more than one authority was measured for the present image")
	}
	for _, a := range own {
		if a.name == next.name && bytes.Equal(a.data, next.data) {
			return nil
		}
	}
	return refuse(7, "the new image is signed by another authority than the present one (%s)", subject(next.cert))
}

// authorityOf returns the authority that lets an image run.
func (d *draft) authorityOf(img *image, measured []authority, shim bool) (authority, error) {
	none := authority{}
	if len(img.signatures) == 0 {
		return none, badFile("Secure Boot is on, and the new image is not signed")
	}
	_, db, err := d.driverConfig(securityDatabase, "db")
	if err != nil {
		return none, err
	}
	lists, err := parseDatabase(db.data)
	if err != nil {
		return none, refuse(7, "db is %v", err)
	}
	if err := d.revoked(img); err != nil {
		return none, err
	}
	trusted := fromDatabase(lists)
	if shim {
		for _, a := range measured {
			if a.name != "db" {
				trusted = append(trusted, a)
			}
		}
	}
	for _, signature := range img.signatures {
		s, err := img.verify(signature)
		if err != nil {
			return none, badFile("Secure Boot is on, and the new image would not start: %v", err)
		}
		for _, a := range trusted {
			if a.cert != nil && s.leadsTo(a.cert) {
				return a, nil
			}
		}
	}
	return none, badFile("Secure Boot is on, and no authority of the running boot signed the new image")
}

// fromDatabase returns the certificates of db as authorities.
func fromDatabase(lists []signatureList) []authority {
	var trusted []authority
	for _, l := range lists {
		for _, e := range l.entries {
			if c, err := x509.ParseCertificate(e[16:]); l.typ == certX509 && err == nil {
				trusted = append(trusted, authority{-1, "db", e, c})
			}
		}
	}
	return trusted
}

// revoked refuses an image whose SHA-256 digest is in dbx, or in the next dbx if that
// changes. It does not evaluate other kinds of entries; the firmware does.
func (d *draft) revoked(img *image) error {
	_, dbx, err := d.driverConfig(securityDatabase, "dbx")
	if err != nil {
		return err
	}
	if d.forbidden != nil {
		dbx.data = d.forbidden
	}
	lists, err := parseDatabase(dbx.data)
	if err != nil {
		return refuse(7, "dbx is %v", err)
	}
	digest := img.digest(crypto.SHA256)
	for _, l := range lists {
		for _, e := range l.entries {
			if l.typ == certSHA256 && bytes.Equal(e[16:], digest) {
				return badFile("the new image is revoked by dbx and would not start")
			}
		}
	}
	return nil
}

func subject(c *x509.Certificate) string {
	if c == nil {
		return "unknown"
	}
	return c.Subject.String()
}
