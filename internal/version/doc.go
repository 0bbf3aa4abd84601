// Package version says which release runs, for kleidi version, for the metrics and for the
// log. The linker sets it in a release; any other build names its revision in git.
package version
