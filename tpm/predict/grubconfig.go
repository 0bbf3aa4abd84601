package predict

import (
	"slices"
	"strings"
)

// configured returns the commands that GRUB will run, and replaces its
// configuration file.
//
// It does not interpret GRUB's language. It demands that the two configurations are equal
// line by line, except for lines that load (linux, initrd), print (echo) or name (menuentry,
// submenu) something. It finds each command that GRUB ran in the running configuration: a
// single line by its words, a menu by its lines, which GRUB measures verbatim. GRUB will run
// a changed line in the place where it ran the former one.
func (d *draft) configured(boot *grubBoot, next, running Files) ([]string, error) {
	commands := make([]string, len(boot.commands))
	for i, c := range boot.commands {
		commands[i] = c.text
	}
	if next.GRUBConfig == nil {
		return commands, nil
	}
	if running.GRUBConfig == nil {
		return nil, badChange("the running grub.cfg is not given, so that nothing shows what the new one changes")
	}
	found := false
	for _, i := range boot.files {
		if d.old.Events[i].Proves(running.GRUBConfig) {
			d.measure(i, next.GRUBConfig)
			found = true
		}
	}
	if !found {
		return nil, refuse(9, "GRUB did not read the grub.cfg that is given as the running one")
	}
	c, err := compareConfig(running.GRUBConfig, next.GRUBConfig)
	if err != nil {
		return nil, err
	}
	if len(commands) > maxCommands {
		return nil, refuse(8, "GRUB ran more than %d commands", maxCommands)
	}
	if n := strings.Count(strings.Join(commands, "\n")+"\n", "\nsetparams "); n > 1 {
		return nil, refuse(8, "an entry of a submenu was chosen")
	}
	for i := range commands {
		if commands[i], err = c.rerun(commands[i]); err != nil {
			return nil, err
		}
	}
	return commands, nil
}

// configChange is a configuration and its replacement, line by line.
type configChange struct {
	was, now []string
	// becomes maps each simple command in the configuration to the commands in the same
	// lines of the replacement.
	becomes map[string][]string
}

// Limits on configurations and commands. Real configurations have 5 to 50 KB, and GRUB runs
// some hundred commands.
const (
	maxConfig   = 256 << 10 // bytes
	maxCommands = 4096
)

func compareConfig(was, now []byte) (*configChange, error) {
	if len(was) > maxConfig || len(now) > maxConfig {
		return nil, badFile("a grub.cfg of more than %d bytes", maxConfig)
	}
	c := &configChange{strings.Split(string(was), "\n"), strings.Split(string(now), "\n"), map[string][]string{}}
	if len(c.was) != len(c.now) {
		return nil, refuse(8, "the new grub.cfg has other entries than the running one")
	}
	for i := range c.was {
		if w := words(c.was[i]); w != nil {
			command, becomes := strings.Join(w, " "), strings.Join(words(c.now[i]), " ")
			if !slices.Contains(c.becomes[command], becomes) {
				c.becomes[command] = append(c.becomes[command], becomes)
			}
		}
		if c.was[i] == c.now[i] {
			continue
		}
		a, b := firstWord(c.was[i]), firstWord(c.now[i])
		if a != b || !slices.Contains([]string{"linux", "linuxefi", "initrd", "initrdefi", "echo", "menuentry", "submenu"}, a) {
			return nil, refuse(8, "line %d of grub.cfg changes more than what is loaded", i+1)
		}
		if a != "menuentry" && a != "submenu" && (words(c.was[i]) == nil || words(c.now[i]) == nil) {
			return nil, refuse(8, "line %d of grub.cfg changes, and what GRUB makes of it cannot be told", i+1)
		}
	}
	return c, nil
}

func firstWord(line string) string {
	if f := strings.Fields(line); len(f) > 0 {
		return f[0]
	}
	return ""
}

// rerun returns the command that GRUB will run in the place of a former one.
func (c *configChange) rerun(text string) (string, error) {
	head, body, menu := strings.Cut(text, "\n")
	if menu {
		return c.rerunMenu(text, strings.Split(body, "\n"))
	}
	if title, ok := strings.CutPrefix(text, "setparams "); ok { // the user or a timeout chose an entry
		if i := c.retitled(title); i >= 0 {
			return "", refuse(8, "line %d of grub.cfg changes the title of an entry that was chosen", i+1)
		}
	}
	becomes := c.becomes[head]
	switch len(becomes) {
	case 0: // it contains variables, or comes from another file: not a changed line
		return text, nil
	case 1:
		return becomes[0], nil
	default:
		return "", refuse(8, "the command %q is in grub.cfg more than once, and not all of them change alike", head)
	}
}

// retitled returns the place of a changed line that may have given an entry that title, or
// -1.
func (c *configChange) retitled(title string) int {
	for i := range c.was {
		if w := firstWord(c.was[i]); c.was[i] == c.now[i] || w != "menuentry" && w != "submenu" {
			continue
		}
		name := strings.TrimLeft(strings.TrimLeft(c.was[i], " \t")[len(firstWord(c.was[i])):], " \t")
		if quoted, ok := strings.CutPrefix(name, "'"); ok {
			name, _, _ = strings.Cut(quoted, "'")
		} else if name, _, _ = strings.Cut(name, " "); strings.ContainsAny(name, "\"\\$") {
			return i
		}
		if strings.HasPrefix(title, name) {
			return i
		}
	}
	return -1
}

// rerunMenu is rerun for a command with a block: menuentry, submenu, function.
func (c *configChange) rerunMenu(text string, body []string) (string, error) {
	inner := body[:len(body)-1] // the last line is the closing brace
	becomes := ""
	for at := 1; at+len(inner) <= len(c.was); at++ {
		if !slices.Equal(c.was[at:at+len(inner)], inner) {
			continue
		}
		if c.was[at-1] != c.now[at-1] {
			return "", refuse(8, "line %d of grub.cfg changes, and what GRUB makes of it cannot be told", at)
		}
		head, _, _ := strings.Cut(text, "\n")
		now := strings.Join(append(append([]string{head}, c.now[at:at+len(inner)]...), body[len(body)-1]), "\n")
		if becomes != "" && becomes != now {
			return "", refuse(8, "the same entry is in grub.cfg more than once, and not all of them change alike")
		}
		becomes = now
	}
	if becomes == "" {
		return "", refuse(8, "a menu of the running boot is not in the running grub.cfg")
	}
	return becomes, nil
}

// words splits a simple line of GRUB's language, of bare words and single quotes, into words.
// It returns nil for any other line, and for an empty one.
func words(line string) []string {
	var all []string
	for line = strings.Trim(line, " \t"); line != ""; line = strings.TrimLeft(line, " \t") {
		var word string
		if line[0] == '\'' {
			end := strings.IndexByte(line[1:], '\'')
			if end < 0 {
				return nil
			}
			word, line = line[1:1+end], line[2+end:]
			if line != "" && line[0] != ' ' && line[0] != '\t' {
				return nil
			}
		} else {
			end := strings.IndexAny(line, " \t")
			if end < 0 {
				end = len(line)
			}
			word, line = line[:end], line[end:]
			if strings.ContainsAny(word, "'\"\\$#;|&{}<>") {
				return nil
			}
		}
		all = append(all, word)
	}
	return all
}
