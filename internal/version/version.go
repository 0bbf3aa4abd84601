package version

import (
	"runtime/debug"
)

// String returns the release, or the revision from which this binary was built.
func String() string {
	if build != "" {
		return build
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			return "devel-" + s.Value[:min(12, len(s.Value))]
		}
	}
	return "devel"
}

// build is set by the linker to the release's version.
var build string
