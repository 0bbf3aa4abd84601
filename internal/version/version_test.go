package version

import "testing"

// TestStamped: the linker's version is used, and without it the version is never empty.
func TestStamped(t *testing.T) {
	former := build
	t.Cleanup(func() { build = former })
	if build = "v1.2.3"; String() != "v1.2.3" {
		t.Error(String())
	}
	if build = ""; String() == "" || String() == "v1.2.3" {
		t.Errorf("%q", String())
	}
}
