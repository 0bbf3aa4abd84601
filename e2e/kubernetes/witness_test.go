package kubernetes

import (
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/seal"
)

// tpmSlot is the part of a TPM slot that the witness reads.
type tpmSlot struct {
	SRK     string            `json:"srk"`     // Name, hexadecimal
	Public  []byte            `json:"public"`  // TPMT_PUBLIC
	Private []byte            `json:"private"` // the buffer of a TPM2B_PRIVATE
	Bank    string            `json:"bank"`
	PCRs    map[string]string `json:"pcrs"`
	Epoch   struct {
		Index  uint32 `json:"index"`
		AtMost uint64 `json:"atMost"`
	} `json:"epoch"`
}

// witness checks the sealed object with tpm2-tools, which share no code with kleidi.
// The object must be a child of the TPM's own storage root key, open only in a policy
// session, and demand PolicyPCR of this boot's values, PolicyNV of the epoch counter,
// and nothing else.
func witness(t *testing.T, m *machine) {
	slot := m.tpmSlot(t)
	tools := &tpmTools{t: t, dir: t.TempDir(), tcti: "swtpm:path=" + strings.TrimPrefix(m.Device(), "unix:")}

	if got := tools.primary(); got != slot.SRK {
		t.Errorf("the storage root key's Name is %s, the slot is for %s", got, slot.SRK)
	}
	tools.write("slot.pub", sized(slot.Public))
	tools.write("slot.priv", sized(slot.Private))
	tools.run("load", "-C", "srk.ctx", "-u", "slot.pub", "-r", "slot.priv", "-c", "slot.ctx")
	tools.run("flushcontext", "-t")
	public := tools.run("readpublic", "-c", "slot.ctx")
	tools.run("flushcontext", "-t")

	const attributes = "fixedtpm|fixedparent|adminwithpolicy|noda"
	if got := field(public, "attributes:", "value:"); got != attributes {
		t.Errorf("the object's attributes are %q, want %q", got, attributes)
	}
	if got := field(public, "type:", "value:"); got != "keyedhash" {
		t.Errorf("the object is a %q, want a keyedhash", got)
	}
	authorization := field(public, "authorization policy:")
	values := tools.pcrs(slot)
	if got := tools.policy(slot, values); got != authorization {
		t.Errorf("the object's authorization policy is %s, PolicyPCR and PolicyNV give %s", authorization, got)
	}
	// The comparison can fail: another kernel in PCR 4 gives another digest.
	values["4"] = strings.Repeat("5a", 32)
	if got := tools.policy(slot, values); got == authorization {
		t.Error("the authorization policy does not depend on PCR 4")
	}
	if out, err := tools.try("unseal", "-c", "slot.ctx"); err == nil {
		t.Errorf("the object opens with an empty password: %d bytes", len(out))
	}
}

func (m *machine) tpmSlot(t *testing.T) (s tpmSlot) {
	t.Helper()
	for _, slot := range m.Keyring().Slots {
		if slot.Type != seal.TypeTPM {
			continue
		}
		if err := json.Unmarshal(slot.Data, &s); err != nil {
			t.Fatalf("kleidi keyring show -o json: data of the TPM slot: %v", err)
		}
		return s
	}
	t.Fatal("kleidi keyring show -o json shows no TPM slot")
	return s
}

// sized prefixes b with its 16-bit size, which makes it a TPM2B.
func sized(b []byte) []byte { return append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...) }

// field returns the text after the last of the names. Each name is searched for after the
// previous one.
func field(text string, names ...string) string {
	for _, name := range names {
		_, after, ok := strings.Cut(text, name)
		if !ok {
			return ""
		}
		text = after
	}
	line, _, _ := strings.Cut(text, "\n")
	return strings.TrimSpace(line)
}

// tpmTools runs tpm2-tools in a separate folder.
type tpmTools struct {
	t         *testing.T
	dir, tcti string
}

func (w *tpmTools) write(name string, b []byte) {
	w.t.Helper()
	if err := os.WriteFile(filepath.Join(w.dir, name), b, 0o600); err != nil {
		w.t.Fatal(err)
	}
}

func (w *tpmTools) read(name string) []byte {
	w.t.Helper()
	b, err := os.ReadFile(filepath.Join(w.dir, name))
	if err != nil {
		w.t.Fatal(err)
	}
	return b
}

func (w *tpmTools) try(verb string, args ...string) (string, error) {
	cmd := exec.Command("tpm2", append([]string{verb}, args...)...)
	cmd.Dir = w.dir
	cmd.Env = append(os.Environ(), "TPM2TOOLS_TCTI="+w.tcti)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("tpm2 %s: %w: %s", verb, err, out)
	}
	return string(out), nil
}

func (w *tpmTools) run(verb string, args ...string) string {
	w.t.Helper()
	out, err := w.try(verb, args...)
	if err != nil {
		w.t.Fatal(err)
	}
	return out
}

// primary makes the TCG's ECC P-256 storage root key, whose unique field is two
// coordinates of 32 zero bytes, and returns its Name in hexadecimal.
func (w *tpmTools) primary() string {
	w.t.Helper()
	// tpm2-tools expect tpm2-tss's memory layout: a little-endian size, then room for
	// 128 bytes.
	coordinate := append([]byte{32, 0}, make([]byte, 128)...)
	w.write("unique", slices.Concat(coordinate, coordinate))
	w.run("createprimary", "-C", "o", "-g", "sha256", "-G", "ecc256:aes128cfb", "-u", "unique", "-c", "srk.ctx",
		"-a", "fixedtpm|fixedparent|sensitivedataorigin|userwithauth|noda|restricted|decrypt")
	w.run("flushcontext", "-t")
	w.run("readpublic", "-c", "srk.ctx", "-n", "srk.name")
	w.run("flushcontext", "-t")
	return hex.EncodeToString(w.read("srk.name"))
}

// pcrs returns the present PCR values in the TPM. The slot must name each of them.
func (w *tpmTools) pcrs(slot tpmSlot) map[string]string {
	w.t.Helper()
	if len(slot.PCRs) == 0 {
		w.t.Fatal("the slot names no PCR")
	}
	values := map[string]string{}
	for pcr, said := range slot.PCRs {
		w.run("pcrread", slot.Bank+":"+pcr, "-o", "pcr")
		values[pcr] = hex.EncodeToString(w.read("pcr"))
		if values[pcr] != said {
			w.t.Errorf("PCR %s is %s, the slot says %s", pcr, values[pcr], said)
		}
	}
	return values
}

// policy computes the digest of PolicyPCR, then PolicyNV, in a trial session.
func (w *tpmTools) policy(slot tpmSlot, values map[string]string) string {
	w.t.Helper()
	var numbers []int
	for pcr := range values {
		n, err := strconv.Atoi(pcr)
		if err != nil {
			w.t.Fatal(err)
		}
		numbers = append(numbers, n)
	}
	slices.Sort(numbers)
	var list []string
	var concatenated []byte
	for _, n := range numbers {
		pcr := strconv.Itoa(n)
		list = append(list, pcr)
		value, err := hex.DecodeString(values[pcr])
		if err != nil {
			w.t.Fatal(err)
		}
		concatenated = append(concatenated, value...)
	}
	w.write("pcrs", concatenated)
	w.write("epoch", binary.BigEndian.AppendUint64(nil, slot.Epoch.AtMost))
	index := fmt.Sprintf("%#x", slot.Epoch.Index)

	w.run("startauthsession", "-S", "trial.ctx")
	defer w.run("flushcontext", "trial.ctx")
	w.run("policypcr", "-S", "trial.ctx", "-l", slot.Bank+":"+strings.Join(list, ","), "-f", "pcrs")
	w.run("policynv", "-S", "trial.ctx", "-C", index, "-i", "epoch", "-L", "digest", index, "ule")
	return hex.EncodeToString(w.read("digest"))
}
