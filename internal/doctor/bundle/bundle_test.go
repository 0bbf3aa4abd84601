package bundle

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/doctor"
	"github.com/beezy-dev/kleidi/internal/doctor/diagnosis"
	"github.com/beezy-dev/kleidi/seal"
)

// planted are secrets of each kind.
var planted = []string{"PIN-271828", "hvs.CAESIJtoken", "AGE-SECRET-KEY-1QQQQ", "-----BEGIN PRIVATE KEY-----", "a2VrLWtlay1rZWsta2VrLWtlay1rZWsta2VrLWtlazA="}

const secret = "PIN-271828 hvs.CAESIJtoken AGE-SECRET-KEY-1QQQQ -----BEGIN PRIVATE KEY----- a2VrLWtlay1rZWsta2VrLWtlay1rZWsta2VrLWtlazA="

// open returns the files of a bundle, all in one text, and their names.
func open(t *testing.T, b []byte) (text string, names []string) {
	t.Helper()
	zip, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	for archive := tar.NewReader(zip); ; {
		h, err := archive.Next()
		if err == io.EOF {
			return text, names
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(archive)
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
		text += string(content) + "\n"
	}
}

// fill plants the secret in every text of a value that has none of a fixed set of words.
func fill(v reflect.Value) {
	switch v.Kind() {
	case reflect.String:
		v.SetString(secret)
	case reflect.Pointer:
		if v.IsNil() {
			v.Set(reflect.New(v.Type().Elem()))
		}
		fill(v.Elem())
	case reflect.Struct:
		for i := range v.NumField() {
			if v.Field(i).CanSet() && v.Type() != reflect.TypeFor[time.Time]() {
				fill(v.Field(i))
			}
		}
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			v.SetBytes([]byte(secret))
			return
		}
		s := reflect.MakeSlice(v.Type(), 1, 1)
		fill(s.Index(0))
		v.Set(s)
	}
}

// TestNothingSecret: every text of the findings, the status, the configuration and the
// journal contains a secret, and the bundle contains none. The texts that it shows have
// the form that kleidi gave them.
func TestNothingSecret(t *testing.T) {
	n := &doctor.Node{Config: config.Default(), Now: time.Unix(1793000000, 0)}
	fill(reflect.ValueOf(&n.Status).Elem())
	c := n.Config
	fill(reflect.ValueOf(c).Elem())
	n.NoConfig, n.Boot.Why, n.TPM.Why = secret, secret, secret
	// choices: the configuration is read strictly, so no other value can appear there
	d := config.Default()
	c.TPM.Bank, c.TPM.Phase, c.Anchor.Store, c.Unlock.Order, c.Memory.Lock, c.Log.Format, c.Vault.Auth.Method = d.TPM.Bank, d.TPM.Phase, d.Anchor.Store, d.Unlock.Order, d.Memory.Lock, d.Log.Format, "approle"
	// values that serve itself makes
	s := &n.Status
	s.State, s.ClusterID, s.Memory, s.Keys = admin.Locked, "c1", "memfd_secret", []admin.KeyReport{{KeyID: "k1-a", Role: "current"}}
	s.Slots[0].Name, s.Slots[0].Type, s.Slots[0].Use = "tpm", "tpm", "present"
	s.Attestation.Boot, s.Attestation.Bank = "grub", "sha256"
	r := diagnosis.Report{}
	for _, id := range []string{"configuration/refused", "keyring/locked", "keyslots/refused", "tpm/silent", "unit/weakened", "cluster-store/unreachable", "cluster-store/removed", "cluster-store/forked", "cluster-store/refused", "encryption-configuration/refused", "nodes/problem"} {
		r.Findings = append(r.Findings, diagnosis.Finding{ID: id, What: secret, Why: secret, Command: secret})
	}
	r.Findings = append(r.Findings, diagnosis.Finding{ID: "disk/full", What: "3 MB left", Command: secret})
	r.NotChecked = []diagnosis.Unchecked{{Check: "pcrs", Reason: secret}}
	journal := fmt.Sprintf("time=2026-11-01T12:00:00Z level=WARN msg=\"a slot does not open\" error=\"%s\" cause=epoch-passed\npanic: %s\n%s\ntime=%s level=INFO msg=x\n", secret, secret, secret, secret)
	var b bytes.Buffer
	if err := Write(&b, n, r, []byte(journal), map[string]string{"kleidi": "v1"}); err != nil {
		t.Fatal(err)
	}
	text, names := open(t, b.Bytes())
	for _, p := range planted {
		if strings.Contains(text, p) {
			t.Errorf("%s is in the bundle:\n%s", p, text)
		}
	}
	for _, want := range []string{"configuration/refused", "3 MB left", `msg="a slot does not open" cause=epoch-passed`, "k1-a", `"other"`, "approle"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %s in\n%s", want, text)
		}
	}
	if len(names) != 6 || !slices.Contains(names, "kleidi-doctor/event-log.json") {
		t.Errorf("%q", names)
	}
}

// TestCauses: only a cause that kleidi knows is shown.
func TestCauses(t *testing.T) {
	for p, want := range map[*admin.Problem]seal.Cause{nil: "", {Cause: seal.CauseEpoch}: seal.CauseEpoch, {Cause: "x"}: "other"} {
		if got := cause(p); got != want {
			t.Errorf("%+v: %q", p, got)
		}
	}
}
