package encryptionconfig

import "testing"

// TestKeptInTheClear: an entry in the clear stays so only beside other entries that
// encrypt. The entry of the cluster store does not count.
func TestKeptInTheClear(t *testing.T) {
	const kms = "[{kms: {apiVersion: v2, name: other, endpoint: 'unix:///a'}}]"
	for text, want := range map[string]bool{
		"[{resources: [secrets], providers: [{identity: {}}]}]":                                                                   false,
		"[{resources: [configmaps], providers: " + kms + "}, {resources: [secrets], providers: [{identity: {}}]}]":                true,
		"[{resources: ['*.kleidi.beezy.dev'], providers: " + kms + "}, {resources: [secrets], providers: [{identity: {}}]}]":      false,
		"[{resources: ['*.kleidi.beezy.dev'], providers: [{identity: {}}]}, {resources: [secrets], providers: [{identity: {}}]}]": false,
		"[{resources: [configmaps], providers: [{identity: {}}]}, {resources: [secrets], providers: [{identity: {}}]}]":           false,
	} {
		e, err := Parse([]byte("apiVersion: " + apiVersion + "\nkind: " + kind + "\nresources: " + text + "\n"))
		if err != nil {
			t.Fatal(err)
		}
		m, err := NewMove(e, Kleidi("kleidi", "/run/kleidi/kms.sock"), nil)
		if err != nil {
			t.Fatal(err)
		}
		if got := m.Kept(e.Resources[len(e.Resources)-1]); got != want {
			t.Errorf("%s: %v, want %v", text, got, want)
		}
	}
}
