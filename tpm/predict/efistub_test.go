package predict

import (
	"slices"
	"testing"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/simboot/peimage"
)

// directLine is the command line of the recorded boot.
const directLine = "console=ttyS0,115200 quiet panic=-1 mboot=a initrd=initrd"

func TestEFIStub(t *testing.T) {
	log, want := readLog(t, "direct-kernel"), readLog(t, "direct-kernel")
	kernel := peimage.Kernel("6.12.57-amd64", "new")
	line, running := "console=ttyS0 initrd=initrd", directLine
	i := find(t, want, 4, "kernel", 0)
	remeasure(want, i, peimage.Hashed(kernel), resized(want.Events[i].UntrustedData, len(kernel)))
	remeasure(want, find(t, want, 9, "LoadOptions", 0), toUTF16Z(line), want.Events[find(t, want, 9, "LoadOptions", 0)].UntrustedData)
	remeasure(want, find(t, want, 9, "Linux initrd", 0), []byte("initrd"), want.Events[find(t, want, 9, "Linux initrd", 0)].UntrustedData)
	got, err := Predict(log, Change{Next: Files{Kernel: kernel, Initrd: []byte("initrd"), CommandLine: &line}, Running: Files{CommandLine: &running}})
	if err != nil {
		t.Fatal(err)
	}
	wantSame(t, got, want)
}

func TestEFIStubRefusals(t *testing.T) {
	line, other := directLine, "another"
	many := directLine + " initrd=second"
	for name, c := range map[string]struct {
		change Change
		says   string
	}{
		"the running command line is not given": {Change{Next: Files{CommandLine: &other}}, "PCR 9"},
		"it is another":                         {Change{Next: Files{CommandLine: &other}, Running: Files{CommandLine: &other}}, "PCR 9"},
		"the running initrd is not given":       {Change{Next: Files{Initrd: []byte("x")}}, "initrd is not given"},
		"it is another (initrd)":                {Change{Next: Files{Initrd: []byte("x")}, Running: Files{Initrd: []byte("y")}}, "own files do not lead"},
		"it is another (kernel)":                {Change{Next: Files{Initrd: []byte("x")}, Running: Files{Kernel: peimage.Kernel("6.1.0", ""), CommandLine: &line}}, "PCR 4"},
		"the kernel is too old":                 {Change{Next: Files{Kernel: peimage.Kernel("5.10.0", "")}}, "EFI stub of the new kernel"},
		"the kernel tells no version":           {Change{Next: Files{Kernel: peimage.Image(peimage.Section{Name: ".text", Content: []byte("x")})}}, "EFI stub"},
		"the kernel is no image":                {Change{Next: Files{Kernel: []byte("x")}}, "not a PE image"},
		"nothing":                               {Change{}, "nothing is named"},
		"a UKI":                                 {Change{Next: Files{UKI: []byte("MZ")}}, "does not boot a unified"},
		"a configuration of GRUB's":             {Change{Next: Files{GRUBConfig: []byte("x")}}, "GRUB"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Predict(readLog(t, "direct-kernel"), c.change)
			wantRefusal(t, err, c.says)
		})
	}
	log := readLog(t, "direct-kernel")
	i := find(t, log, 9, "LoadOptions", 0)
	remeasure(log, i, toUTF16Z(many), log.Events[i].UntrustedData)
	_, err := Predict(log, Change{Next: Files{Initrd: []byte("x")}, Running: Files{CommandLine: &many}})
	wantRefusal(t, err, "initrd is not given")
}

func TestEFIStubLogsThatAreNotUnderstood(t *testing.T) {
	log := readLog(t, "direct-kernel")
	log.Events = slices.Insert(log.Events, find(t, log, 9, "Linux initrd", 0)+1, log.Events[find(t, log, 4, "kernel", 0)])
	_, err := Predict(log, Change{Next: Files{Kernel: peimage.Kernel("6.1.0", "")}})
	wantRefusal(t, err, "PCR 4", "not the last image")
}

// A PCR that is neither demanded nor known is left out, not carried over.
func TestPCRsThatAreNotDemanded(t *testing.T) {
	old := peimage.Kernel("5.10.0", "")
	got, err := Predict(readLog(t, "direct-kernel"), Change{Next: Files{Kernel: old}, PCRs: []int{4, 7}})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range got.Events {
		if e.PCR == 9 {
			t.Error("PCR 9 is in the prediction")
		}
	}
	if _, err := eventlog.Parse(got.Encode()); err != nil {
		t.Error(err)
	}
}
