package measuredboot

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"

	"github.com/beezy-dev/kleidi/e2e/measuredboot/guest/disk"
	"github.com/beezy-dev/kleidi/e2e/measuredboot/guest/wire"
	"github.com/beezy-dev/kleidi/seal"
)

// next is the image after a distribution's update: another kernel, initrd and command
// line.
var next = with(uki, func(i *image) {
	i.kernel, i.initrd, i.commandLine, i.uname = "debian-kernel@example.org", "of the next kernel", "mitigations=auto", "next"
})

// TestUpdate prepares an update, makes it, and then tries to go back with everything
// that an attacker may have kept of the disk.
func TestUpdate(t *testing.T) {
	t.Parallel()
	m := newMachine(t, shared, ownKeys)
	file := func(i image) []byte { return must[[]byte](t)(os.ReadFile(must[string](t)(shared.uki(i)))) }
	updated := disk.File{Name: "tmp/next.efi", Mode: 0o600, Data: file(next)}
	var kept []disk.File // the whole state folder, with both slots
	m.series("UKI, update", []boot{
		{what: "the first image; kleidi reseal --next-uki", image: uki, files: []disk.File{updated}, first: []wire.Step{initialize},
			then: []wire.Step{kleidi("reseal", "--next-uki", "/"+updated.Name)}, want: opens},
		{what: "the first image, once more before the update", image: uki, want: opens},
		{what: "the next image", image: next, before: func(m *machine) { kept = m.state }, want: opens, moved: []int{4, 9, 11}},
		{what: "the first image, with the whole disk from before the update", image: uki,
			before: func(m *machine) { m.state, kept = kept, m.state }, want: locked, cause: seal.CauseEpoch},
		{what: "the next image, with its own disk", image: next, before: func(m *machine) { m.state = kept }, want: opens, moved: []int{4, 9, 11}},
	})
}

// TestUpdateOfDbx revokes a boot loader, as fwupd does.
func TestUpdateOfDbx(t *testing.T) {
	t.Parallel()
	m := newMachine(t, shared, ownKeys)
	m.series("UKI, update of dbx", []boot{
		{what: "kleidi reseal --next-dbx, then the update", image: uki, files: revocation(t), first: []wire.Step{initialize},
			then: []wire.Step{kleidi("reseal", "--next-dbx", "/tmp/dbxupdate.bin"), {Copy: &[2]string{"/tmp/dbx.variable", dbxVariable}}}, want: opens},
		{what: "the same image, with the new dbx", image: uki, want: opens, moved: []int{7}},
		{what: "the same image, with the firmware's variables from before", image: uki, before: (*machine).resetVariables,
			want: locked, cause: seal.CauseBootState, says: []string{"PCR 7"}},
	})
}

const (
	imageSecurityGUID = "d719b2cb-3d3a-4596-a3bc-dad00e67656f" // EFI_IMAGE_SECURITY_DATABASE_GUID
	dbxVariable       = "/sys/firmware/efi/efivars/dbx-" + imageSecurityGUID
)

// revocation returns an update of dbx, signed by the machine's KEK, and the same update
// in the form that Linux's efivarfs expects, with the variable's attributes in front.
func revocation(t *testing.T) []disk.File {
	t.Helper()
	digest := sha256.Sum256([]byte("a boot loader that had a hole"))
	var list bytes.Buffer // EFI_SIGNATURE_LIST of type EFI_CERT_SHA256_GUID, with one entry
	list.Write([]byte{0x26, 0x16, 0xc4, 0xc1, 0x4c, 0x50, 0x92, 0x40, 0xac, 0xa9, 0x41, 0xf9, 0x36, 0x93, 0x43, 0x28})
	for _, n := range []uint32{28 + 16 + sha256.Size, 0, 16 + sha256.Size} {
		list.Write(binary.LittleEndian.AppendUint32(nil, n))
	}
	list.Write(make([]byte, 16)) // the owner
	list.Write(digest[:])
	dir := t.TempDir()
	file, signed := filepath.Join(dir, "list"), filepath.Join(dir, "signed")
	if err := os.WriteFile(file, list.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	const attributes = 0x67 // append, time-based authentication, runtime, boot service, non-volatile
	must[string](t)(output("sbvarsign", "--key", shared.key, "--cert", snakeoil+".pem", "--guid", imageSecurityGUID,
		"--attr", "APPEND_WRITE,TIME_BASED_AUTHENTICATED_WRITE_ACCESS,RUNTIME_ACCESS,BOOTSERVICE_ACCESS,NON_VOLATILE", "--output", signed, "dbx", file))
	update := must[[]byte](t)(os.ReadFile(signed))
	return []disk.File{
		{Name: "tmp/dbxupdate.bin", Mode: 0o600, Data: update},
		{Name: "tmp/dbx.variable", Mode: 0o600, Data: append(binary.LittleEndian.AppendUint32(nil, attributes), update...)},
	}
}

// nextGRUB is the image after an update of the initrd and of GRUB's configuration.
var nextGRUB = with(grub, func(i *image) { i.initrd, i.commandLine = "of the next kernel", "mitigations=auto" })

func TestUpdateOfGRUB(t *testing.T) {
	t.Parallel()
	m := newMachine(t, shared, microsoftKeys)
	initrd := must[[]byte](t)(os.ReadFile(must[string](t)(shared.initrdFile(nextGRUB))))
	files := []disk.File{
		{Name: "tmp/initrd", Mode: 0o600, Data: initrd},
		{Name: "tmp/grub.cfg", Mode: 0o600, Data: []byte(nextGRUB.grubConfig())},
		{Name: "tmp/grub.cfg.booted", Mode: 0o600, Data: []byte(grub.grubConfig())},
	}
	m.series("GRUB, update", []boot{
		{what: "the first files; kleidi reseal --next-initrd --next-grub-config", image: grub, files: files, first: []wire.Step{initialize},
			then: []wire.Step{kleidi("reseal", "--next-initrd", "/tmp/initrd", "--next-grub-config", "/tmp/grub.cfg", "--running-grub-config", "/tmp/grub.cfg.booted")}, want: opens},
		{what: "the next files", image: nextGRUB, want: opens, moved: []int{8, 9}},
		{what: "the first files, after the update", image: grub, want: locked, cause: seal.CauseBootState, says: []string{"PCR 8", "PCR 9"}},
	})
}
