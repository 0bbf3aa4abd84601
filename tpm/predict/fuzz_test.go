package predict

import (
	"bytes"
	"crypto"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/beezy-dev/kleidi/tpm/eventlog"
	"github.com/beezy-dev/kleidi/tpm/simboot/peimage"
)

// Whatever a file says, reading it uses only its own bytes: parts of an image are in
// the file and do not overlap, and reading takes the time of a few passes.
func FuzzImage(f *testing.F) {
	signed, err := signers().ca.Sign(peimage.UKI("252.1", peimage.Section{Name: ".linux", Content: peimage.Kernel("6.1.0", "x")}))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(signed)
	f.Add(peimage.Kernel("6.1.0-56-amd64", "kernel"))
	f.Add(signed[:0x300])
	f.Add([]byte("MZ"))
	f.Fuzz(func(t *testing.T, file []byte) {
		kernelVersion(file)
		start := time.Now()
		img, err := parsePE(file)
		if err != nil {
			return
		}
		n := 0
		for _, p := range img.hashed {
			n += len(p)
		}
		if n > len(file) || len(img.sections) > maxSections || len(img.signatures) > maxSignatures {
			t.Errorf("%d of %d bytes hashed, %d sections, %d signatures", n, len(file), len(img.sections), len(img.signatures))
		}
		for _, s := range img.sections {
			if len(s.content) > len(file) || s.whole && uint64(len(s.content)) != s.end-s.start {
				t.Errorf("section %s of %d bytes", s.name, len(s.content))
			}
		}
		for _, s := range img.signatures {
			if signer, err := img.verify(s); err == nil && !signer.leadsTo(signer.leaf) {
				t.Error("a signer without itself")
			}
		}
		_ = payload(img)
		commandLine(img.content(".cmdline"))
		stubVersion(img)
		img.digest(crypto.SHA256)
		if d := time.Since(start); d > time.Minute {
			t.Errorf("%v for %d bytes", d, len(file))
		}
	})
}

// A database that parses encodes to the same bytes, and an update never loses an entry.
func FuzzDbx(f *testing.F) {
	one, two := hashes(1, "a", "b").encode(), hashes(1, "b", "c").encode()
	f.Add(one, signedDbx(two))
	f.Add(one, append(bytes.Clone(one), two...))
	f.Add([]byte{}, signedDbx(one))
	f.Fuzz(func(t *testing.T, present, file []byte) {
		if lists, err := parseDatabase(present); err == nil {
			var again []byte
			for _, l := range lists {
				again = append(again, l.encode()...)
			}
			if !bytes.Equal(again, present) {
				t.Error("a database does not encode to itself")
			}
		}
		next, err := nextDbx(present, file)
		if err != nil {
			return
		}
		if _, err := parseDatabase(next); err != nil && len(next) <= maxDatabase {
			t.Error(err)
		}
		if _, signed := signedUpdate(file); signed && !bytes.HasPrefix(next, present) {
			t.Error("an update that does not append")
		}
	})
}

// Any log and any files: no panic, and a prediction has the events of a log.
func FuzzPredict(f *testing.F) {
	for _, name := range []string{"uki-secureboot", "shim-grub-secureboot", "direct-kernel"} {
		raw, err := os.ReadFile(filepath.Join("testdata", name))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw, peimage.Kernel("6.1.0", "x"), []byte(realConfig), []byte(realConfig), directLine)
	}
	f.Fuzz(func(t *testing.T, raw, image, config, running []byte, line string) {
		log, err := eventlog.Parse(raw)
		if err != nil {
			return
		}
		for _, c := range []Change{
			{Next: Files{UKI: image}}, {Next: Files{UKI: image}, Running: Files{UKI: image}},
			{Next: Files{Kernel: image, Initrd: config, CommandLine: &line}, Running: Files{CommandLine: &line}},
			{Next: Files{Kernel: image, Initrd: image, GRUBConfig: config}, Running: Files{GRUBConfig: running}},
			{Dbx: config},
		} {
			next, err := Predict(log, c)
			if err != nil {
				continue
			}
			if _, err := eventlog.Parse(next.Encode()); err != nil {
				t.Error(err)
			}
		}
	})
}
