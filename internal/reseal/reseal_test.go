package reseal

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/config"
	"github.com/beezy-dev/kleidi/internal/node/nodetest"
	"github.com/beezy-dev/kleidi/seal"
	"github.com/beezy-dev/kleidi/tpm"
	"github.com/beezy-dev/kleidi/tpm/authpolicy"
	"github.com/beezy-dev/kleidi/tpm/bootstate"
)

func digest(b byte) []byte { return bytes.Repeat([]byte{b}, 32) }

// TestRefreshed: the PCRs that a signed boot state demands literally follow the running
// boot. No PCR is added, and no other state changes.
func TestRefreshed(t *testing.T) {
	present := tpm.BootState{PCR: authpolicy.PCR{Bank: crypto.SHA256, Values: map[int][]byte{4: digest(1), 7: digest(2)}}}
	for name, row := range map[string]struct {
		use  tpm.Use
		bank crypto.Hash
		want byte // of PCR 7
	}{
		"signed":           {tpm.UseSigned, crypto.SHA256, 2},
		"other bank":       {tpm.UseSigned, crypto.SHA384, 9},
		"next":             {tpm.UseNext, crypto.SHA256, 9},
		"for a suspension": {tpm.UseSuspend, crypto.SHA256, 9},
	} {
		s := tpm.BootState{PCR: authpolicy.PCR{Bank: row.bank, Values: map[int][]byte{7: digest(9), 8: digest(8)}}, Use: row.use}
		got := refreshed(s, present)
		if !bytes.Equal(got.Values[7], digest(row.want)) || !bytes.Equal(got.Values[8], digest(8)) || len(got.Values) != 2 {
			t.Errorf("%s: %x", name, got.Values)
		}
		if !bytes.Equal(s.Values[7], digest(9)) {
			t.Errorf("%s: the state that was given has changed", name)
		}
	}
}

// TestOneGeneration: a file of signed boot states is for one key, one cluster and one
// generation.
func TestOneGeneration(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	another, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	cluster, other := seal.ClusterID{1}, seal.ClusterID{2}
	sign := func(signer crypto.Signer, ref []byte) bootstate.State {
		s, err := bootstate.Sign(signer, authpolicy.PCR{Bank: crypto.SHA256, Values: map[int][]byte{11: digest(7)}}, ref, "test")
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	for name, row := range map[string]struct {
		states []bootstate.State
		want   uint64
		says   string
	}{
		"one":             {[]bootstate.State{sign(key, bootstate.Ref(cluster, 3))}, 3, ""},
		"two":             {[]bootstate.State{sign(key, bootstate.Ref(cluster, 3)), sign(key, bootstate.Ref(cluster, 3))}, 3, ""},
		"systemd's":       {[]bootstate.State{sign(key, nil)}, 0, ""},
		"none":            {nil, 0, "holds no signed boot state"},
		"two generations": {[]bootstate.State{sign(key, bootstate.Ref(cluster, 3)), sign(key, bootstate.Ref(cluster, 4))}, 0, "several generations"},
		"another cluster": {[]bootstate.State{sign(key, bootstate.Ref(other, 3))}, 0, "signed for a cluster other than"},
		"another key":     {[]bootstate.State{sign(key, nil), sign(another, nil)}, 0, "sign"},
	} {
		ref, g, err := oneGeneration(cluster, row.states, key.Public())
		switch {
		case row.says != "" && (err == nil || !strings.Contains(err.Error(), row.says)):
			t.Errorf("%s: %v", name, err)
		case row.says == "" && (err != nil || g != row.want || !bytes.Equal(ref, row.states[0].Ref)):
			t.Errorf("%s: generation %d, %v", name, g, err)
		}
	}
}

// TestRecordedPCRs: the named PCRs are recorded once each, in ascending order.
func TestRecordedPCRs(t *testing.T) {
	n := nodetest.New(t)
	for _, row := range []struct{ given, want []int }{
		{[]int{7, 4, 7}, []int{4, 7}}, {[]int{23, 0}, []int{0, 23}}, {[]int{24}, nil}, {[]int{0, -1}, nil},
	} {
		got, err := RecordedPCRs(n, slices.Clone(row.given))
		if !slices.Equal(got, row.want) || (err == nil) != (row.want != nil) {
			t.Errorf("%v: %v, %v", row.given, got, err)
		}
	}
}

// TestNextFiles: each file reaches the boot that it belongs to, and a missing file is an
// error. A command line that isn't given is not an empty one.
func TestNextFiles(t *testing.T) {
	dir := t.TempDir()
	file := func(name string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	f := NextFiles{
		Next:    BootFiles{Uki: file("next uki"), Kernel: file("next kernel"), Initrd: file("next initrd"), GrubConfig: file("next grub")},
		Running: BootFiles{Uki: file("uki"), Kernel: file("kernel"), Initrd: file("initrd"), GrubConfig: file("grub")},
		Dbx:     file("dbx"), CommandLine: "", HasLine: true, RunningCommandLine: "quiet\n", HasRunningLine: true,
	}
	c, err := f.Change()
	if err != nil {
		t.Fatal(err)
	}
	for want, got := range map[string][]byte{
		"next uki": c.Next.UKI, "next kernel": c.Next.Kernel, "next initrd": c.Next.Initrd, "next grub": c.Next.GRUBConfig,
		"uki": c.Running.UKI, "kernel": c.Running.Kernel, "initrd": c.Running.Initrd, "grub": c.Running.GRUBConfig, "dbx": c.Dbx,
	} {
		if string(got) != want {
			t.Errorf("%q in the place of %q", got, want)
		}
	}
	if c.Next.CommandLine == nil || *c.Next.CommandLine != "" || c.Running.CommandLine == nil || *c.Running.CommandLine != "quiet" {
		t.Error("the command lines differ")
	}
	c, err = (&NextFiles{CommandLine: "ignored", RunningCommandLine: "ignored"}).Change()
	if err != nil || c.Next.CommandLine != nil || c.Running.CommandLine != nil || c.Next.UKI != nil {
		t.Errorf("of nothing: %+v, %v", c, err)
	}
	f.Next.Initrd += ".none"
	if _, err := f.Change(); err == nil || !strings.Contains(err.Error(), "next initrd.none") {
		t.Errorf("a missing file: %v", err)
	}
}

// TestSuspendedBoots: a suspension covers at least one boot, and few.
func TestSuspendedBoots(t *testing.T) {
	for _, boots := range []int{-1, 0, maxBoots + 1} {
		if _, err := Suspend(t.Context(), nodetest.New(t), admin.SuspendRequest{Boots: boots}); err == nil || !strings.Contains(err.Error(), "want 1 to 16") {
			t.Errorf("%d: %v", boots, err)
		}
	}
}

// TestAnchorHolds: while the anchor is in the TPM, a suspension must demand the PCRs that
// the anchor is bound to.
func TestAnchorHolds(t *testing.T) {
	n := nodetest.New(t)
	for name, row := range map[string]struct {
		store string
		pcr   int // the PCR that the slot demands
		holds bool
	}{
		"file": {config.AnchorFile, 4, true}, "TPM": {config.AnchorTPM, 7, true}, "TPM, let go": {config.AnchorTPM, 4, false},
	} {
		n.Config.Anchor.Store = row.store
		err := anchorHolds(n, tpm.BootState{PCR: authpolicy.PCR{Values: map[int][]byte{row.pcr: digest(1)}}})
		if (err == nil) != row.holds || err != nil && !strings.Contains(err.Error(), "bound to PCR 7") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
