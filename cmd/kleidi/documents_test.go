package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestCommandsInDocuments: each kleidi command that a document or a file in deploy/ shows
// can be typed as written. Its verb and its flags exist, and in a block of commands its
// arguments are present. e2e/docs runs many of these commands; this test also sees those
// that need a cluster, a token or another distribution, which nothing runs as written.
func TestCommandsInDocuments(t *testing.T) {
	blocks, mentions := 0, 0
	for _, file := range documentFiles(t) {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range shownCommands(string(b), filepath.Ext(file) == ".md") {
			if c.whole {
				blocks++
			} else {
				mentions++
			}
			if err := c.check(); err != nil {
				t.Errorf("%s:%d: kleidi %s: %v", file, c.line, c.text, err)
			}
		}
	}
	if blocks < 150 || mentions < 300 {
		t.Errorf("only %d commands in blocks, and %d in sentences, were found", blocks, mentions)
	}
}

// TestShownCommands: what the test above finds in a document.
func TestShownCommands(t *testing.T) {
	for text, want := range map[string]string{
		"```sh\nsudo kleidi rotate\n```":                                       "",
		"```sh\nsudo kleidi rotatte\n```":                                      "there is no verb",
		"```sh\nsudo kleidi rotate --wait # then look\n```":                    "",
		"```sh\nsudo kleidi rotate --wat\n```":                                 "unknown flag",
		"```sh\nkleidi keyring backup\n```":                                    "arg",
		"```sh\nkleidi keyring backup \\\n  FILE\n```":                         "",
		"```sh\nkleidi slot\n```":                                              "only prints its help",
		"```sh\ncrictl exec \"$(crictl ps)\" /kleidi stat\n```":                "there is no verb",
		"```sh\nkubectl exec POD -- /kleidi --config FILE status --qick\n```":  "unknown flag",
		"```sh\nx=$(kleidi statis | tail)\n```":                                "there is no verb",
		"```sh\nkleidi usage && sudo kleidi encryption-confg\n```":             "there is no verb",
		"```text\nkleidi tries again\n```":                                     "",
		"see `kleidi rotate`":                                                  "",
		"see `kleidi rotatte`":                                                 "there is no verb",
		"see `kleidi slot rewarp`":                                             "there is no verb",
		"see `sudo kleidi rotate --wat`":                                       "there is no flag",
		"kleidi tries again, and `kleidi` too":                                 "",
		"| `x` | `chmod 0600 F && kleidi reseel   # or kleidi rotate --abort`": "there is no verb",
	} {
		var got error
		for _, c := range shownCommands(text, true) {
			got = errors.Join(got, c.check())
		}
		if want == "" && got != nil || want != "" && (got == nil || !strings.Contains(got.Error(), want)) {
			t.Errorf("%q: %v, want %q", text, got, want)
		}
	}
}

// documentFiles returns the documents, and the files in deploy/.
func documentFiles(t *testing.T) (files []string) {
	t.Helper()
	for _, root := range []string{"../../README.md", "../../CONTRIBUTING.md", "../../SECURITY.md", "../../CHANGELOG.md", "../../docs", "../../deploy"} {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() && filepath.Ext(path) != ".go" {
				files = append(files, path)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return files
}

// shownCommand is the text after "kleidi", up to the end of the command.
type shownCommand struct {
	line  int
	text  string
	whole bool // it stands in a block, with all its arguments
}

var (
	codeSpan = regexp.MustCompile("`[^`]+`")
	// shellStart matches kleidi where a shell reads a command. A path counts only without a
	// folder, as in the images: elsewhere a path that ends in kleidi is an argument.
	shellStart = regexp.MustCompile(`(?:^|sudo |timeout \d+ |[|&;(] *|(?:^| )/)kleidi +`)
	shellEnd   = regexp.MustCompile(`[|&;)<>]|(?:^|\s)#| 2>`)
	quotation  = regexp.MustCompile(`"[^"]*"|'[^']*'`)
	// substitution matches the innermost $(…) of a line.
	substitution = regexp.MustCompile(`"?\$\(([^()]*)\)"?`)
	// label matches the domain separation strings of docs/keyring-format.md.
	label       = regexp.MustCompile(`^kleidi [a-z ]+ v\d$`)
	programPath = regexp.MustCompile(`(?:^|\s)/kleidi |/bin/kleidi `)
	sentenceEnd = regexp.MustCompile(`[,.;:'"]+( |$)`)
)

// shownCommands returns the commands in a document: those of its blocks of shell commands,
// and those in code spans. Of any other file it returns each "kleidi" that a verb follows.
func shownCommands(text string, markdown bool) (all []shownCommand) {
	lines := strings.Split(text, "\n")
	open, shell := false, false
	for i := 0; i < len(lines); i++ {
		line, at := strings.TrimSpace(lines[i]), i+1
		name, isFence := strings.CutPrefix(line, "```")
		switch {
		case !markdown:
			for _, c := range commandsIn(programPath.ReplaceAllString(line, " kleidi ")) {
				all = append(all, shownCommand{line: at, text: sentenceEnd.Split(c, 2)[0]})
			}
		case isFence:
			open = !open
			shell = open && slices.Contains([]string{"sh", "console", "shell", "bash"}, name)
		case shell:
			for strings.HasSuffix(line, `\`) && i+1 < len(lines) {
				i++
				line = strings.TrimSuffix(line, `\`) + strings.TrimSpace(lines[i])
			}
			for _, c := range shellCommands(line) {
				all = append(all, shownCommand{at, c, true})
			}
		case !open:
			for _, span := range codeSpan.FindAllString(line, -1) {
				span = strings.ReplaceAll(strings.Trim(span, "`"), `\|`, "|")
				if label.MatchString(span) {
					continue
				}
				for _, c := range shellCommands(span) {
					all = append(all, shownCommand{line: at, text: c})
				}
			}
		}
	}
	return all
}

// shellCommands returns the arguments of each kleidi on a line of shell.
func shellCommands(line string) (commands []string) {
	for m := substitution.FindStringSubmatch(line); m != nil; m = substitution.FindStringSubmatch(line) {
		commands = append(commands, shellCommands(m[1])...)
		line = strings.Replace(line, m[0], "OUTPUT", 1)
	}
	line = quotation.ReplaceAllString(line, "QUOTED")
	for _, at := range shellStart.FindAllStringIndex(line, -1) {
		commands = append(commands, strings.TrimSpace(shellEnd.Split(line[at[1]:], 2)[0]))
	}
	return commands
}

// check finds the verb with cobra. A command of a block is parsed as a shell would run it;
// of a command in a sentence, each flag must exist.
func (c shownCommand) check() error {
	cmd, rest, err := newRoot().Find(strings.Fields(c.text))
	unknown := cmd != nil && cmd.HasSubCommands() && cmd.Name() != "verifier" && len(rest) > 0 && !strings.HasPrefix(rest[0], "-")
	if err != nil || !cmd.HasParent() || unknown {
		return errors.New("there is no verb of this name")
	}
	if c.whole {
		if err := cmd.ParseFlags(rest); err != nil {
			return err
		}
		return complete(cmd, cmd.Flags().Args())
	}
	for _, word := range rest {
		name, isFlag := strings.CutPrefix(strings.TrimRight(word, ".,"), "--")
		name, _, _ = strings.Cut(name, "=")
		if !isFlag {
			continue
		}
		if _, err := flagOf(cmd, name); err != nil {
			return err
		}
	}
	return nil
}
