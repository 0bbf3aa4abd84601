package bootpolicy

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

// maxNote bounds a note, in runes.
const maxNote = 160

// printable makes a line of untrusted text fit for a terminal, a log and a
// comment: no control or formatting characters, single spaces, at most n runes.
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

// note is printable for a comment, without the marks that open one.
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
