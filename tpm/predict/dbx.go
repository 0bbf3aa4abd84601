package predict

import (
	"github.com/beezy-dev/kleidi/tpm/eventlog"
)

// driverConfig finds a variable that the firmware measured before PCR 7's separator. It wants
// exactly one event, whose digests prove its data.
func (d *draft) driverConfig(vendor guid, name string) (at int, v variable, err error) {
	at = -1
	for _, i := range d.indexes(7, anyEvent) {
		e := d.old.Events[i]
		if e.Proves([]byte{0, 0, 0, 0}) {
			break
		}
		found, ok := parseVariable(e.UntrustedData)
		if !ok || found.vendor != vendor || found.name != name {
			continue
		}
		if at >= 0 || !provesItself(e) || e.UntrustedType != eventlog.EFIVariableDriverConfig {
			return -1, v, refuse(7, "%s: the variable %s is measured twice, or its digest is not that of its data", where(i, e), name)
		}
		at, v = i, found
	}
	if at < 0 {
		return -1, v, refuse(7, "the log has no event of the variable %s", name)
	}
	return at, v, nil
}

// dbx replaces dbx, the list of revoked programs.
func (d *draft) dbx(file []byte) error {
	at, v, err := d.driverConfig(securityDatabase, "dbx")
	if err != nil {
		return err
	}
	content, err := nextDbx(v.data, file)
	if err != nil {
		return err
	}
	v.data = content
	d.forbidden = content
	data := v.encode()
	d.measureText(at, data, data)
	return nil
}

// nextDbx returns the content of the dbx variable after an update by file.
func nextDbx(present, file []byte) ([]byte, error) {
	old, err := parseDatabase(present)
	if err != nil {
		return nil, refuse(7, "the present dbx is %v", err)
	}
	payload, signed := signedUpdate(file)
	lists, err := parseDatabase(payload)
	if err != nil || len(lists) == 0 {
		return nil, badFile("the dbx file is %v, nor a signed update with one; a copy from efivarfs begins with 4 bytes too many", errDatabase)
	}
	if signed {
		return appendDatabase(present, old, lists), nil
	}
	have := entrySet{}
	have.add(lists)
	for _, l := range old {
		for _, e := range l.entries {
			if !have.has(l.typ, e) {
				return nil, badFile("the dbx file lacks entries of the present dbx, so that it is not the whole variable")
			}
		}
	}
	return payload, nil
}

// appendDatabase does what firmware does with EFI_VARIABLE_APPEND_WRITE (EDK II,
// FilterSignatureList in SecurityPkg's AuthService.c): it drops the entries of each new list
// that a present list of the same type has, and appends the rest in its order.
func appendDatabase(present []byte, old, update []signatureList) []byte {
	have := entrySet{}
	have.add(old)
	content := append([]byte(nil), present...)
	for _, l := range update {
		kept := l
		kept.entries = nil
		for _, e := range l.entries {
			if !have.has(l.typ, e) {
				kept.entries = append(kept.entries, e)
			}
		}
		content = append(content, kept.encode()...)
	}
	return content
}

// signedUpdate takes the header off an EFI_VARIABLE_AUTHENTICATION_2 (UEFI 2.10,
// 8.2.2): a time, and a WIN_CERTIFICATE_UEFI_GUID with a PKCS#7 signature. Only the firmware
// verifies the signature. If it refuses the update, the next boot equals the running one,
// whose slot still opens.
func signedUpdate(file []byte) (payload []byte, signed bool) {
	const time, certificate = 16, 24
	r := &reader{rest: file}
	r.bytes(time)
	length, revision, typ, cert := r.uint(4), r.uint(2), r.uint(2), r.guid()
	if r.err != nil || revision != 0x0200 || typ != 0x0ef1 || cert != certPKCS7 || length < certificate {
		return file, false
	}
	r.bytes(length - certificate)
	if r.err != nil {
		return nil, true
	}
	return r.rest, true
}
