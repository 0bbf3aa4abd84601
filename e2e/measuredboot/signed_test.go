package measuredboot

import (
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"github.com/beezy-dev/kleidi/e2e/measuredboot/guest/disk"
	"github.com/beezy-dev/kleidi/e2e/measuredboot/guest/wire"
	"github.com/beezy-dev/kleidi/seal"
)

// TestSignedBootState signs the next image with an operator's key, away from the
// machine, and revokes it again.
func TestSignedBootState(t *testing.T) {
	t.Parallel()
	m := newMachine(t, shared, ownKeys)
	var kept []disk.File
	moved := []int{4, 9, 11}
	m.series("UKI, signed boot state", []boot{
		{what: "the first image", image: uki, first: []wire.Step{initialize}, want: opens},
		{what: "the first image; kleidi bootstate add for the next one", image: uki, before: (*machine).signNext,
			then: []wire.Step{kleidi("bootstate", "add", "/tmp/states.json", "--public-key", "/tmp/operator.pub")}, want: opens},
		{what: "the next image", image: next, want: opens, moved: moved},
		{what: "an image that nobody signed for", image: other, want: locked, cause: seal.CauseBootState, moved: moved, says: []string{"PCR 4"}},
		{what: "the first image; kleidi bootstate revoke", image: uki, before: func(m *machine) { kept = m.state },
			last: func(m *machine) []wire.Step { return []wire.Step{kleidi("bootstate", "revoke", m.signer(t))} }, want: opens},
		{what: "the next image, with the whole disk from before", image: next, before: func(m *machine) { m.state, kept = kept, m.state },
			want: locked, cause: seal.CauseEpoch, moved: moved},
		{what: "the first image, with its own disk", image: uki, before: func(m *machine) { m.state = kept }, want: opens},
	})
}

// signNext does the operator's work on another machine, with the event log of the first
// boot and the files of the next boot.
func (m *machine) signNext() {
	m.t.Helper()
	log, key, public, states := m.path("event.log"), m.path("operator.pem"), m.path("operator.pub"), m.path("states.json")
	if err := os.WriteFile(log, m.first.EventLog, 0o600); err != nil {
		m.t.Fatal(err)
	}
	run := func(name string, args ...string) { m.t.Helper(); must[string](m.t)(output(name, args...)) }
	run("openssl", "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", key)
	run("openssl", "pkey", "-in", key, "-pubout", "-out", public)
	run(kleidiBinary(), "bootstate", "sign", "--key", key, "--cluster-id", m.keyring().ClusterID().String(), "--event-log", log,
		"--next-uki", must[string](m.t)(shared.uki(next)), "--out", states)
	for _, file := range []string{public, states} {
		m.files = append(m.files, disk.File{Name: "tmp/" + filepath.Base(file), Mode: 0o600, Data: must[[]byte](m.t)(os.ReadFile(file))})
	}
}

// signer is the fingerprint of the operator's key.
func (m *machine) signer(t *testing.T) string {
	t.Helper()
	var states map[string][]struct{ PKFP string }
	if err := json.Unmarshal(must[[]byte](t)(os.ReadFile(m.path("states.json"))), &states); err != nil {
		t.Fatal(err)
	}
	return states["sha256"][0].PKFP
}
