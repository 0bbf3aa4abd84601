package measuredboot

import (
	"testing"

	"filippo.io/age"

	"github.com/beezy-dev/kleidi/e2e/measuredboot/guest/disk"
	"github.com/beezy-dev/kleidi/e2e/measuredboot/guest/wire"
	"github.com/beezy-dev/kleidi/seal"
)

func kleidi(args ...string) wire.Step {
	return wire.Step{Run: append([]string{wire.Kleidi}, args...)}
}

// initialize makes the keyring. Nobody has the identity of this recipient.
var initialize = kleidi("init", "--recovery-recipient", "age1lggyhqrw2nlhcxprm67z43rta597azn8gknawjehu9d9dl0jq3yqqvfafg")

var (
	uki  = image{loader: "uki"}
	grub = image{loader: "grub"}
)

func with(i image, change func(*image)) image {
	change(&i)
	return i
}

func TestUKI(t *testing.T) {
	t.Parallel()
	m := newMachine(t, shared, ownKeys)
	m.network = true
	m.files = []disk.File{joiner}
	s := newSeat(t)
	m.series("UKI", []boot{
		{what: "signed image, Secure Boot on", image: uki, first: []wire.Step{initialize}, then: ask, want: opens, check: s.learn},
		{what: "same again; kleidi join makes it a node of another cluster", image: uki, want: opens,
			last:  func(m *machine) []wire.Step { return append(s.admit(), s.serveJoined(m.seed)...) },
			check: func(t *testing.T, _ *booted) { s.has(t, true) }},
		{what: "other command line; kleidi join is refused", image: with(uki, func(i *image) { i.commandLine = "init=/bin/sh" }),
			want: locked, cause: seal.CauseBootState, moved: []int{4, 9, 11}, says: []string{"PCR 4", "PCR 11"},
			last:    func(*machine) []wire.Step { return s.admit() },
			refused: "boot policy"},
		{what: "other initrd", image: with(uki, func(i *image) { i.initrd = "#!/bin/sh\n" }),
			want: locked, cause: seal.CauseBootState, moved: []int{4, 9, 11}, says: []string{"PCR 4", "PCR 11"}},
		{what: "other kernel", image: with(uki, func(i *image) { i.kernel = "somebody@example.org" }),
			want: locked, cause: seal.CauseBootState, moved: []int{4, 11}, says: []string{"PCR 4", "PCR 11"}},
		{what: "other image with the same sections", image: with(uki, func(i *image) { i.uname = "other" }),
			want: locked, cause: seal.CauseBootState, moved: []int{4}, says: []string{"PCR 4"}},
		{what: "image without a signature", image: with(uki, func(i *image) { i.unsigned = true }), want: notStarted},
		{what: "Secure Boot off", image: uki, before: func(m *machine) { m.setVariables(noKeys) },
			want: locked, cause: seal.CauseBootState, moved: []int{4, 7}, says: []string{"PCR 4", "PCR 7"}},
		{what: "keyring of an attacker, sealed to this boot", image: uki, before: func(m *machine) { m.setVariables(ownKeys) },
			files: []disk.File{attacker}, first: replaceKeyring(t), discard: true, want: locked, cause: seal.CauseAnchor, says: []string{"does not hold the anchored key ID"}},
		{what: "the first image, after all of the above", image: uki, want: opens},
		{what: "same disk and boot, other TPM", image: uki, before: (*machine).newTPM,
			want: locked, cause: seal.CauseOtherTPM, says: []string{"sealed by another TPM"}},
	})
}

// attacker configures a second kleidi on the same TPM.
var attacker = disk.File{Name: "etc/attacker.yaml", Mode: 0o600, Data: []byte(`apiVersion: kleidi.beezy.dev/v1alpha1
kind: KleidiConfiguration
node: cp1
state:
  dir: /tmp/attacker
admin:
  socket: /run/attacker.sock
` + patientTPM)}

// replaceKeyring replaces the real keyring with an attacker's. The attacker's keyring is
// sealed to this boot on this TPM, so its slot opens, and the attacker knows its KEK.
func replaceKeyring(t *testing.T) []wire.Step {
	identity := must[*age.X25519Identity](t)(age.GenerateX25519Identity())
	return []wire.Step{
		kleidi("init", "--recovery-recipient", identity.Recipient().String(), "--config", "/"+attacker.Name),
		{Forge: &wire.Forge{Real: keyringFile, Own: "/tmp/attacker/keyring.json", Identity: identity.String()}},
	}
}

func TestGRUB(t *testing.T) {
	t.Parallel()
	m := newMachine(t, shared, microsoftKeys)
	m.series("GRUB", []boot{
		{what: "shim, GRUB and kernel as Debian signs them", image: grub, first: []wire.Step{initialize}, want: opens},
		{what: "same again", image: grub, want: opens},
		{what: "other command line", image: with(grub, func(i *image) { i.commandLine = "init=/bin/sh" }),
			want: locked, cause: seal.CauseBootState, moved: []int{8, 9}, says: []string{"PCR 8", "PCR 9"}},
		{what: "other initrd", image: with(grub, func(i *image) { i.initrd = "#!/bin/sh\n" }),
			want: locked, cause: seal.CauseBootState, moved: []int{9}, says: []string{"PCR 9"}},
		{what: "the first files, after all of the above", image: grub, want: opens},
	})
}

// TestSealedToPCR7 shows what the other tests would look like without protection: a
// table of refusals could also come from a kleidi that never opens.
func TestSealedToPCR7(t *testing.T) {
	t.Parallel()
	m := newMachine(t, shared, ownKeys)
	m.settings = "tpm:\n  timeout: 4m\n  pcrs: [7]\n  anySignedBoot: true\n"
	m.series("UKI, sealed to PCR 7 alone (do not do this)", []boot{
		{what: "tpm.pcrs: [7]; kleidi init", image: uki, first: []wire.Step{initialize}, want: opens},
		{what: "other command line", image: with(uki, func(i *image) { i.commandLine = "init=/bin/sh" }), want: opens, moved: []int{4, 9, 11}},
	})
}
