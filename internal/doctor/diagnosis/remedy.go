package diagnosis

import (
	"regexp"
	"strings"

	"github.com/beezy-dev/kleidi/seal"
)

const (
	// rejoin is for a node that was removed.
	rejoin = "systemctl stop kleidi && kleidi reset   # to be a node again, have another node approve this one, and join"
	// untaken names the task for a keyring in the cluster store that a node does not take.
	untaken = `see "A fork, or a keyring that nobody takes" in docs/high-availability.md`
	// ForkedRemedy is for a node whose keyring and the cluster store's are a fork.
	ForkedRemedy = "kleidi keyring show   # here, and on a node that is in step; then " + untaken
)

// Remedy returns the command for a problem with this cause and hint: that of the hint, or else
// another one.
func Remedy(cause seal.Cause, hint, otherwise string) string {
	if cause == seal.CauseNodeRemoved { // its hint is prose
		return rejoin
	}
	return FromHint(hint, otherwise)
}

// RefusedRemedy returns the command for a keyring in the cluster store that this node does not
// take. A keyring that removed this node while it was down is one of these.
func RefusedRemedy(cause seal.Cause, hint string) string {
	line := "kleidi node list   # on a node that is in step: does it still list this one? "
	// The hint of a damaged keyring is about the one on this node's own disk.
	if hint != "" && cause != seal.CauseKeyringCorrupt {
		line += oneLine(hint) + "; "
	}
	return line + untaken
}

// hintedCommand matches a hint that begins with one of kleidi's commands.
var hintedCommand = regexp.MustCompile(`^(?:run )?(kleidi (?:status|recover|reseal|rotate|prune|init|migrate|(?:slot|keyring|node|cluster|bootpolicy) [a-z]+)` +
	`(?: --[^ ;,]+| [A-Z]+| (?:tpm|pkcs11|vault|recovery))*)(?:[;,] (.*))?$`)

// FromHint returns the command with which a hint begins, or else another one. The rest of the
// hint is a comment.
func FromHint(hint, otherwise string) string {
	hint = oneLine(hint)
	if hint == "" {
		return otherwise
	}
	command, comment := otherwise, hint
	if m := hintedCommand.FindStringSubmatch(hint); m != nil {
		command, comment = m[1], m[2]
	}
	if comment == "" {
		return command
	}
	return command + "   # " + comment
}

func oneLine(text string) string { return strings.Join(strings.Fields(text), " ") }
