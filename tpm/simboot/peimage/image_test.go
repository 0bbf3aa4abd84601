package peimage

import (
	"bytes"
	"debug/pe"
	"testing"
)

// Go's own reader finds the same sections.
func TestSections(t *testing.T) {
	want := []Section{{".osrel", []byte("ID=x\n")}, {".initrd", bytes.Repeat([]byte("x"), 5000)}, {".linux", Kernel("6.1.0", "k")}}
	image := UKI("252.1", want...)
	f, err := pe.NewFile(bytes.NewReader(image))
	if err != nil {
		t.Fatal(err)
	}
	got := Sections(image)[2:] // behind the stub's
	for i, s := range want {
		content, err := f.Section(s.Name).Data()
		if err != nil {
			t.Fatal(err)
		}
		if got[i].Name != s.Name || !bytes.Equal(got[i].Content, s.Content) || !bytes.Equal(content[:len(s.Content)], s.Content) {
			t.Errorf("section %s differs", s.Name)
		}
	}
}

func TestFixedSigner(t *testing.T) {
	one, err := FixedSigner("Example Signature Database Key")
	if err != nil {
		t.Fatal(err)
	}
	again, err := FixedSigner("Example Signature Database Key")
	if err != nil {
		t.Fatal(err)
	}
	other, err := FixedSigner("Other")
	if err != nil {
		t.Fatal(err)
	}
	if !one.Cert.Equal(again.Cert) || one.Cert.Equal(other.Cert) {
		t.Error("the certificate does not follow from the name")
	}
	if err := one.Cert.CheckSignatureFrom(one.Cert); err != nil {
		t.Error(err)
	}
}
