package bootpolicy

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

// maxNote bounds a note, in runes.
const maxNote = 160

// printable makes untrusted text safe to show in a terminal, a log or a comment: one line, no
// control or formatting characters, single spaces, at most n runes.
func printable(s string, n int) string {
	s = strings.Join(strings.Fields(strings.Map(func(r rune) rune {
		switch {
		case unicode.IsSpace(r):
			return ' '
		case !unicode.IsPrint(r) || r == utf8.RuneError:
			return '?'
		}
		return r
	}, s)), " ")
	if len(s) <= n || utf8.RuneCountInString(s) <= n {
		return s
	}
	return strings.TrimRight(string([]rune(s)[:n-1]), " ") + "…"
}

// note makes text printable for a comment, and strips leading comment marks.
func note(s string) string {
	return printable(strings.TrimLeft(printable(s, len(s)+1), "# "), maxNote)
}

// short abbreviates a digest or PCR value.
func short(hex string) string {
	if len(hex) > 12 {
		return hex[:12] + "…"
	}
	return hex
}
