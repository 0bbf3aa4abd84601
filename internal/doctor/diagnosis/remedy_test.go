package diagnosis

import "testing"

// TestFromHint: what doctor prints as a command is one, also where a hint is prose.
func TestFromHint(t *testing.T) {
	for hint, want := range map[string]string{
		"":                                        "kleidi status",
		"run kleidi slot add pkcs11":              "kleidi slot add pkcs11",
		"kleidi reseal --new-tpm":                 "kleidi reseal --new-tpm",
		"run kleidi slot rewrap NAME":             "kleidi slot rewrap NAME",
		"run kleidi rotate, and wait":             "kleidi rotate   # and wait",
		"run kleidi init first":                   "kleidi status   # run kleidi init first",
		"see that the module's file is\nreadable": "kleidi status   # see that the module's file is readable",
	} {
		if got := FromHint(hint, "kleidi status"); got != want {
			t.Errorf("%q: %q, want %q", hint, got, want)
		}
	}
}
