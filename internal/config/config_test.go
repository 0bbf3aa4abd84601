package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

const head = "apiVersion: kleidi.beezy.dev/v1alpha1\nkind: KleidiConfiguration\n"

// Parse reads a configuration as Load reads a file.
func Parse(b []byte) (*Config, error) {
	p := &problems{}
	c, err := decode(b, p)
	if err != nil {
		return nil, err
	}
	return c.checked(p)
}

func TestParse(t *testing.T) {
	c, err := Parse([]byte(head + `
node: cp-1
state: {dir: /srv/kleidi}
tpm:
  device: unix:/run/swtpm.sock
  timeout: 5s
  bank: sha384
  pcrs: [4, 7, 11]
  epochIndex: 0x01804b02
kms:
  socketMode: "0660"
  allowedUIDs: [0, 65534]
log: {level: debug, format: json}
`))
	if err != nil {
		t.Fatal(err)
	}
	if c.Node != "cp-1" || c.State.Dir != "/srv/kleidi" || c.TPM.Timeout != 5*time.Second || len(c.TPM.PCRs) != 3 ||
		c.TPM.EpochIndex != 0x01804b02 || c.KMS.SocketMode != 0o660 || len(c.KMS.AllowedUIDs) != 2 || c.Log.Level.String() != "DEBUG" {
		t.Errorf("%+v", c)
	}
	if c.KMS.Socket != "/run/kleidi/kms.sock" || c.Admin.Socket != "/run/kleidi/admin.sock" {
		t.Errorf("defaults are gone: %+v", c)
	}
}

func TestEveryProblemIsReportedAtOnce(t *testing.T) {
	_, err := Parse([]byte(`
apiVersion: kleidi.beezy.dev/v2
kind: KleidiConfiguration
nodes: x
state: {dir: relative}
tpm:
  pcrs: all
  timeout: soon
  colour: red
  bank: md5
  device: tpm0
  epochIndex: 7
kms:
  socketMode: rw
  name: "a:b"
  name: twice
http: {address: "0.0.0.0:80"}
log: verbose
memory:
`))
	if err == nil {
		t.Fatal("accepted")
	}
	for _, want := range []string{
		"apiVersion: \"kleidi.beezy.dev/v2\"", "nodes: line 4: unknown key", "state.dir: \"relative\" is not an absolute path",
		"tpm.pcrs: line 7: want a list of numbers", "tpm.timeout: line 8: want a duration", "tpm.colour: line 9: unknown key", "tpm.bank: \"md5\"", "tpm.device: \"tpm0\" is no TPM", "tpm.epochIndex: NV index",
		"kms.socketMode: line 14: want permission bits", "kms.name: line 16: duplicate key", "kms.name: \"a:b\"",
		"http.address: \"0.0.0.0:80\" is not on loopback", "log: line 18: want keys with values", "memory: line 19: want keys",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("no %q in\n%v", want, err)
		}
	}
}

func TestSocketMode(t *testing.T) {
	for text, want := range map[string]FileMode{
		`"0600"`: 0o600, `0660`: 0o660, `"660"`: 0o660, `"0775"`: 0o775, `"0200"`: 0o200,
		`"0600garbage"`: 0, `"0o660"`: 0, `"06 oops"`: 0, `"66 0"`: 0, `" 660"`: 0, `"-660"`: 0, `"+660"`: 0, `"6_60"`: 0, `"0680"`: 0, `""`: 0,
		`"1600"`: 0, `"40000000600"`: 0, // no permission bits
		`"0"`: 0, `"0000"`: 0, `"0666"`: 0, `"0602"`: 0, `"0777"`: 0, // nobody; everybody
	} {
		c, err := Parse([]byte(head + "kms: {socketMode: " + text + "}\n"))
		switch {
		case want == 0 && (err == nil || !strings.Contains(err.Error(), "kms.socketMode: line 3: want permission bits in octal, no write for others")):
			t.Errorf("%s: %+v, %v", text, c, err)
		case want != 0 && (err != nil || c.KMS.SocketMode != want):
			t.Errorf("%s: %v, %+v", text, err, c)
		}
	}
}

func TestValuesThatCouldNotWork(t *testing.T) {
	for text, want := range map[string]string{
		"tpm: {pcrs: [4, 7, 10]}":             "tpm.pcrs: IMA extends PCR 10 for as long as the machine runs; leave it out",
		"tpm: {pcrs: [4, 7, 16]}":             "tpm.pcrs: PCR 16 does not exist or can be reset",
		"kms: {allowedUIDs: []}":              "kms.allowedUIDs: the list is empty, so nobody could call; leave the key out for root and the socket's owner",
		"kms: {allowedUIDs: [-1]}":            "kms.allowedUIDs[0]: line 3: want",
		"kms: {allowedUIDs: [a]}":             "kms.allowedUIDs[0]: line 3: want",
		"tpm: {pcrs: [4, 7, 0x0a]}":           "IMA extends PCR 10",
		"tpm: {bootPolicy: policy.yaml}":      "tpm.bootPolicy: \"policy.yaml\" is not an absolute path",
		"tpm: {bootStates: [states.json]}":    "tpm.bootStates: \"states.json\" is not an absolute path",
		"tpm: {phase: shutdown}":              "tpm.phase: \"shutdown\"",
		"tpm: {verifier: {address: \"v:1\"}}": "tpm.verifier.publicKey: want the file",
		"tpm: {verifier: {address: v}}":       "tpm.verifier: address: ",
		"tpm: {verifier: {address: \"v:1\", publicKey: /k, certificate: abc}}": "tpm.verifier: certificate: ",
		"tpm: {verifier: {address: \"v:1\", timeout: 1m}}":                     "tpm.verifier.timeout: want more than 0, and less than tpm.timeout, 30s",
		"pin: {store: tpm}":                       "pin: line 3: this key is named anchor now; rename it",
		"anchor: {store: nvram}":                  "anchor.store: \"nvram\"",
		"anchor: {pcrs: []}":                      "anchor.pcrs: the list is empty",
		"anchor: {pcrs: [16]}":                    "anchor.pcrs: PCR 16",
		"anchor: {index: 7}":                      "anchor.index: ",
		"anchor: {store: tpm, index: 0x01804B01}": "anchor.index: 0x01804b01 is tpm.epochIndex too",
	} {
		if c, err := Parse([]byte(head + text + "\n")); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %+v, %v", text, c, err)
		}
	}
}

func TestVaultKeyInTheTPM(t *testing.T) {
	const server = "vault: {address: \"https://v\", key: k, auth: "
	for text, want := range map[string]string{
		"{method: cert, certFile: /c, tpmKeyFile: /t}":                 "",
		"{method: cert, certFile: /c, tpmKeyFile: /t, role: r}":        "",
		"{method: cert, certFile: /c, tpmKeyFile: t}":                  "vault.auth.tpmKeyFile: \"t\" is not an absolute path",
		"{method: cert, tpmKeyFile: /t}":                               "vault.auth.certFile: \"\" is not an absolute path",
		"{method: cert, certFile: /c, keyFile: /k, tpmKeyFile: /t}":    "vault.auth.tpmKeyFile: vault.auth.keyFile names a key as well",
		"{method: token, tokenFile: /f, certFile: /c, tpmKeyFile: /t}": "vault.auth.tpmKeyFile: the method token doesn't use it",
		"{method: cert, certFile: /c}":                                 "vault.auth.keyFile: it is missing",
	} {
		_, err := Parse([]byte(head + server + text + "}\n"))
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func TestSealedPIN(t *testing.T) {
	const token = "pkcs11: {module: /m.so, "
	for text, want := range map[string]string{
		"uri: \"pkcs11:object=k\", sealedPINFile: /s":                               "",
		"uri: \"pkcs11:object=k\", sealedPINFile: s":                                "pkcs11.sealedPINFile: \"s\" is not an absolute path",
		"uri: \"pkcs11:object=k\", sealedPINFile: /s, pinFile: /p":                  "pkcs11: pinFile, or the URI's pin-source, names a PIN beside sealedPINFile; remove one of them",
		"uri: \"pkcs11:object=k?pin-source=file:/p\", sealedPINFile: /s":            "names a PIN beside sealedPINFile",
		"uri: \"pkcs11:object=k?pin-source=file:/p\", sealedPINFile: \"\"":          "",
		"uri: \"pkcs11:object=k\", sealedPINFile: /s, sealedPINFile: /t, pinFile: ": "pkcs11.sealedPINFile: line 3: duplicate key",
	} {
		_, err := Parse([]byte(head + token + text + "}\n"))
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func TestBadFiles(t *testing.T) {
	for name, content := range map[string]string{
		"empty": "", "a list": "- a", "no version": "kind: KleidiConfiguration\n", "not YAML": "a: [",
		"null": head + "node: null\n", "alias": head + "node: &a x\nstate: {dir: *a}\n", "huge": strings.Repeat("#", maxSize+1),
	} {
		if _, err := Parse([]byte(content)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestLoad(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "none.yaml")
	if _, err := Load(missing); err == nil || !strings.Contains(err.Error(), "--config") {
		t.Errorf("a named file that is missing: %v", err)
	}
	c, err := Load("")
	if _, statErr := os.Stat(DefaultPath); statErr != nil && (err != nil || c.Node == "" || c.State.Dir != "/var/lib/kleidi") {
		t.Errorf("no file at all: %+v, %v", c, err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(head + "node: a\n"))
	f.Add([]byte("tpm: {pcrs: [1], timeout: 1s}\nkms: {socketMode: \"0600\"}\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := Parse(b); err == nil && (c.APIVersion != APIVersion || c.Node == "") {
			t.Errorf("accepted %+v", c)
		}
	})
}
