package gather

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/grpcserver/admin"
	"github.com/beezy-dev/kleidi/internal/doctor"
	"github.com/beezy-dev/kleidi/internal/founding"
	"github.com/beezy-dev/kleidi/internal/node/nodetest"
	"github.com/beezy-dev/kleidi/internal/reseal"
	"github.com/beezy-dev/kleidi/tpm/predict"
	"github.com/beezy-dev/kleidi/tpm/simboot"
	"github.com/beezy-dev/kleidi/tpm/tpmtest"
)

// TestNextBoots: the boot of a new image is predicted, and is prepared once a keyslot is
// sealed to it. A file that is no image gives a reason.
func TestNextBoots(t *testing.T) {
	machine := nodetest.New(t, nodetest.OnTPM(tpmtest.New(t, simboot.Baseline(simboot.UKI))))
	_, recipient := nodetest.Identity(t)
	if _, err := founding.Init(t.Context(), machine, founding.InitOptions{Recipients: []string{recipient}}); err != nil {
		t.Fatal(err)
	}
	if err := machine.Unlocker.Unlock(t.Context()); err != nil {
		t.Fatal(err)
	}
	n := &doctor.Node{Root: t.TempDir()}
	write := func(file string, b []byte) {
		t.Helper()
		path := filepath.Join(n.Root, file)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	const same, other, none = "/efi/EFI/Linux/same.efi", "/efi/EFI/Linux/other.efi", "/efi/EFI/Linux/none.efi"
	boot := simboot.Baseline(simboot.UKI)
	present, err := boot.Files()
	if err != nil {
		t.Fatal(err)
	}
	boot.Kernel = "6.99.0"
	next, err := boot.Files()
	if err != nil {
		t.Fatal(err)
	}
	write("/proc/stat", []byte("btime 1793000000\n"))
	write(same, present.UKI)
	write(other, next.UKI)
	write(none, []byte("not an image"))
	write("/efi/EFI/Linux/old.efi", next.UKI)
	if err := os.Chtimes(filepath.Join(n.Root, "/efi/EFI/Linux/old.efi"), time.Time{}, time.Unix(1792000000, 0)); err != nil {
		t.Fatal(err)
	}
	got := nextBoots(t.Context(), machine, n)
	if v := got[same].Value; v == nil || !v.Prepared || len(v.Moved) > 0 {
		t.Errorf("the running image: %+v, %s", v, got[same].Why)
	}
	if v := got[other].Value; v == nil || v.Prepared || !slices.Equal(v.Moved, []int{4, 11}) {
		t.Errorf("another kernel: %+v, %s", v, got[other].Why)
	}
	if got[none].Value != nil || got[none].Why == "" || len(got) != 3 {
		t.Errorf("%+v", got)
	}
	if _, err := reseal.ToNext(t.Context(), machine, predict.Change{Next: predict.Files{UKI: next.UKI}}, func(s *admin.BootState) (admin.KeyringState, error) {
		return reseal.Next(t.Context(), machine, admin.ResealRequest{Next: s})
	}); err != nil {
		t.Fatal(err)
	}
	if v := nextBoots(t.Context(), machine, n)[other].Value; v == nil || !v.Prepared {
		t.Errorf("a keyslot is for it: %+v", v)
	}
}
