//go:build manpages

package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra/doc"
)

// main, with the tag manpages, writes the manual pages into a folder: one for each verb.
// deploy/packages/build runs it. The shipped binary does not link the library.
func main() {
	root := newRoot()
	root.DisableAutoGenTag = true
	header := &doc.GenManHeader{Section: "8", Source: "kleidi", Manual: "kleidi"}
	if err := doc.GenManTree(root, header, os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}
