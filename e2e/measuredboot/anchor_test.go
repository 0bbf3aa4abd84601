package measuredboot

import (
	"testing"

	"filippo.io/age"

	"github.com/beezy-dev/kleidi/e2e/measuredboot/guest/disk"
	"github.com/beezy-dev/kleidi/e2e/measuredboot/guest/wire"
	"github.com/beezy-dev/kleidi/seal"
)

// anchorIndex is the NV index of kleidi's anchor in the TPM.
const anchorIndex = 0x01804B02

func TestAnchorInTPM(t *testing.T) {
	t.Parallel()
	m := newMachine(t, shared, ownKeys)
	m.settings = "anchor:\n  store: tpm\n"
	identity := must[*age.X25519Identity](t)(age.GenerateX25519Identity())
	identityFile := disk.File{Name: "tmp/identity", Mode: 0o600, Data: []byte(identity.String() + "\n")}
	m.series("UKI, anchor in the TPM", []boot{
		{what: "init --anchor tpm, then rotate", image: uki,
			first: []wire.Step{kleidi("init", "--anchor", "tpm", "--recovery-recipient", identity.Recipient().String()), {Copy: &[2]string{keyringFile, savedFile}}},
			then:  []wire.Step{kleidi("rotate")}, want: opens},
		{what: "keyring from before the rotation put back", image: uki, first: []wire.Step{{Copy: &[2]string{savedFile, keyringFile}}},
			discard: true,
			want:    locked, cause: seal.CauseAnchor, says: []string{"run kleidi keyring restore"}},
		{what: "keyring of an attacker, sealed to this boot", image: uki, files: []disk.File{attacker}, first: replaceKeyring(t), discard: true,
			want: locked, cause: seal.CauseAnchor, says: []string{"does not hold the anchored key ID"}},
		{what: "another system removes the anchor's NV index", image: other, first: []wire.Step{{Undefine: anchorIndex}},
			want: locked, cause: seal.CauseAnchor, moved: []int{4, 9, 11}, says: []string{"it is gone from the TPM"}},
		{what: "the first image after that; kleidi recover", image: uki, files: []disk.File{identityFile},
			last: func(m *machine) []wire.Step {
				return []wire.Step{kleidi("recover", "--identity-file", "/"+identityFile.Name, "--trust-key-id", string(m.keyring().CurrentID()))}
			},
			want: locked, cause: seal.CauseAnchor, says: []string{"it is gone from the TPM", "run kleidi recover"}},
		{what: "the first image again", image: uki, want: opens},
	})
}

// savedFile is an attacker's copy of the keyring.
const savedFile = wire.StateDir + "/keyring-of-before.json"
