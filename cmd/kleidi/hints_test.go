package main

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// standIn replaces a part of a message that is filled in at run time.
const standIn = "FILLED-IN"

// TestHintedCommands: each kleidi command in a message can be typed as written. Its
// verb and its flags exist, and its arguments are present, or words in capitals stand
// for them.
func TestHintedCommands(t *testing.T) {
	checked := 0
	for _, m := range messages(t, "../..") {
		for _, c := range commandsIn(m.text) {
			checked++
			if err := typeable(c, m.prose); err != nil {
				t.Errorf("%s: kleidi %s: %v\n\tin: %s", m.at, c, err, m.text)
			}
		}
	}
	if checked < 100 {
		t.Errorf("only %d commands were found", checked)
	}
}

// TestTypeable: examples that the test above would find.
func TestTypeable(t *testing.T) {
	for text, want := range map[string]string{
		"run kleidi rotate":                                              "",
		"run kleidi recover; or not":                                     "",
		"run kleidi rotate, and wait":                                    "",
		"or run kleidi recover with the recovery identity":               "",
		"run kleidi slot add vault once it answers":                      "",
		"run kleidi slot add recovery --recipient age1…":                 "",
		"run kleidi keyring restore BACKUP":                              "",
		"kleidi tries again":                                             "",
		"run kleidi slot add " + standIn:                                 "",
		"see kleidi slot list":                                           "",
		"run kleidi recovr":                                              "no verb",
		"run kleidi slot":                                                "only prints its help",
		"run kleidi slot list --all":                                     "no flag",
		"run kleidi slot rewrap":                                         "arg",
		"run kleidi slot rewrap with --new-key":                          "between the command and its flag",
		"run kleidi slot add recovery":                                   "--recipient",
		"run kleidi keyring restore":                                     "FILE or --previous",
		"run kleidi keyring restore with a backup":                       "FILE or --previous",
		"kleidi keyring verify --identity-file":                          "no flag",
		"kleidi recover --identity-file":                                 "its value",
		"as kleidi vault-key writes it":                                  "",
		"see kleidi bootpolicy check":                                    "required",
		"run kleidi bootpolicy check --boot-policy F --evidence FILE.":   "",
		"run kleidi bootpolicy check --boot-policy FILE":                 "evidence event-log",
		"sign it with kleidi bootstate sign":                             "required",
		"run kleidi rotate --skip-slot NAME --skip-slot OTHER to go on":  "",
		"use `kleidi suspend` before, or run kleidi reseal after it":     "",
		"the running kleidi serve: it is kleidi 1.x's, or kleidi's file": "",
	} {
		var got error
		for _, c := range commandsIn(text) {
			got = errors.Join(got, typeable(c, false))
		}
		if want == "" && got != nil || want != "" && (got == nil || !strings.Contains(got.Error(), want)) {
			t.Errorf("%q: %v, want %q", text, got, want)
		}
	}
}

// TestHintsAreFields: a hint is a field of an error, so that -o json prints it apart from
// the message. In a text of errors.New or fmt.Errorf it would stay in the message.
func TestHintsAreFields(t *testing.T) {
	fset := token.NewFileSet()
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range files {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(fset, path, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(f, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok || len(call.Args) == 0 {
				return true
			}
			fun, ok := call.Fun.(*ast.SelectorExpr)
			if !ok || !slices.Contains([]string{"New", "Errorf"}, fun.Sel.Name) || !slices.Contains([]string{"errors", "fmt"}, fmt.Sprint(fun.X)) {
				return true
			}
			text, _ := folded(call.Args[0])
			if _, hint, ok := strings.Cut(text, "; "); ok && !slices.Contains([]string{"nothing was changed", "nothing was made", standIn}, hint) {
				t.Errorf("%s: %q stands in the message; give it to seal.Errorf", fset.Position(call.Pos()), hint)
			}
			return true
		})
	}
}

// message is a string in the source.
type message struct {
	at    token.Position
	text  string
	prose bool // help, which explains a command and names no arguments
}

// messages returns the strings of all files below dir except tests. A sum of strings
// counts as one, with [standIn] for each part that is not constant.
func messages(t *testing.T, dir string) (all []message) {
	t.Helper()
	fset := token.NewFileSet()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && slices.Contains([]string{"e2e", ".git", "testdata"}, d.Name()):
			return filepath.SkipDir
		case strings.Contains(path, "joinproof"), strings.Contains(path, "grpcserver/join/server.go"), strings.HasSuffix(path, "seal/keyring/labels.go"): // future verbs, and strings that are no commands
			return nil
		case !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go"):
			return nil
		}
		f, err := parser.ParseFile(fset, path, nil, 0)
		if err != nil {
			return err
		}
		prose := map[ast.Node]bool{}
		ast.Inspect(f, func(n ast.Node) bool {
			if kv, ok := n.(*ast.KeyValueExpr); ok {
				if key, ok := kv.Key.(*ast.Ident); ok && slices.Contains([]string{"Long", "Short", "Use"}, key.Name) {
					prose[kv.Value] = true
				}
			}
			e, ok := n.(ast.Expr)
			if !ok {
				return true
			}
			if text, ok := folded(e); ok && strings.Contains(text, "kleidi ") {
				all = append(all, message{fset.Position(e.Pos()), text, prose[e]})
				return false
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// folded returns the text of a string, or of a sum of strings; ok says that at least one
// part is constant.
func folded(e ast.Expr) (text string, ok bool) {
	switch e := e.(type) {
	case *ast.BasicLit:
		if text, err := strconv.Unquote(e.Value); err == nil && e.Kind == token.STRING {
			return regexp.MustCompile(`%[-+# 0-9.]*[a-z]`).ReplaceAllString(text, standIn), true
		}
	case *ast.BinaryExpr:
		if e.Op == token.ADD {
			x, okX := folded(e.X)
			y, okY := folded(e.Y)
			return x + y, okX || okY
		}
	}
	return standIn, false
}

// mention matches a text that is about a command, and asks nobody to run it.
var mention = regexp.MustCompile(`^[a-z0-9-]+( [a-z]+)? (prints|shows|writes|wrote)\b`)

var commandStart = regexp.MustCompile("(run |^|[\\s(`])kleidi ")

// commandsIn returns the text after each "kleidi" that begins a command. After the word
// run, every "kleidi" does.
func commandsIn(text string) (commands []string) {
	for _, at := range commandStart.FindAllStringSubmatchIndex(text, -1) {
		rest := text[at[1]:]
		if next := commandStart.FindStringIndex(rest); next != nil {
			rest = rest[:next[0]]
		}
		word, _, _ := strings.Cut(trimmed(rest), " ")
		word = strings.TrimRight(word, ",;:.)`'")
		isVerb := slices.ContainsFunc(newRoot().Commands(), func(c *cobra.Command) bool { return c.Name() == word })
		if text[at[2]:at[3]] == "run " || isVerb && !mention.MatchString(rest) {
			commands = append(commands, trimmed(rest))
		}
	}
	return commands
}

// trimmed returns a line that continues a line with a backslash at its end.
func trimmed(s string) string {
	s = regexp.MustCompile(`\s*\\\n\s*`).ReplaceAllString(s, " ")
	s, _, _ = strings.Cut(s, "\n\n")
	return strings.Join(strings.Fields(s), " ")
}

// typeable checks a command; prose may follow it.
func typeable(text string, prose bool) error {
	cmd := newRoot()
	words := strings.Split(text, " ")
	next := func() (word string, last bool) {
		if len(words) == 0 {
			return "", true
		}
		word = strings.TrimRight(words[0], ",;:.)`")
		return word, word != words[0]
	}
	ended := false
	for !ended {
		word, last := next()
		i := slices.IndexFunc(cmd.Commands(), func(c *cobra.Command) bool { return c.Name() == word })
		if i < 0 {
			break
		}
		cmd, words, ended = cmd.Commands()[i], words[1:], last
	}
	if !cmd.HasParent() {
		return errors.New("there is no verb of this name")
	}
	var args []string
	for !ended && len(words) > 0 {
		word, last := next()
		name, isFlag := strings.CutPrefix(word, "--")
		switch {
		case isFlag:
			name, _, hasValue := strings.Cut(name, "=")
			flag, err := flagOf(cmd, name)
			if err != nil {
				return err
			}
			words, ended = words[1:], last
			if hasValue || flag.NoOptDefVal != "" {
				break
			}
			if word, last = next(); ended || word == "" || !isArgument(cmd, word) && !prose {
				return fmt.Errorf("--%s lacks its value", flag.Name)
			}
			words, ended = words[1:], last
		case isArgument(cmd, word):
			args, words, ended = append(args, word), words[1:], last
		case word == "with" && len(words) > 1 && strings.HasPrefix(words[1], "--") && !prose:
			return errors.New("a word stands between the command and its flag")
		default:
			ended = true
		}
	}
	if prose {
		return nil
	}
	return complete(cmd, args)
}

// flagOf returns a flag and marks it as set; NAME… stands for any flag with that prefix.
func flagOf(cmd *cobra.Command, name string) (flag *pflag.Flag, err error) {
	_ = cmd.ParseFlags(nil) // adds the parents' flags
	prefix, open := strings.CutSuffix(name, "…")
	cmd.Flags().VisitAll(func(f *pflag.Flag) {
		if f.Name == name || open && strings.HasPrefix(f.Name, prefix) {
			flag = f
		}
	})
	if flag == nil {
		return nil, fmt.Errorf("there is no flag --%s", name)
	}
	flag.Changed = true
	if open {
		flag = &pflag.Flag{Name: name, NoOptDefVal: "its files"}
	}
	return flag, nil
}

// isArgument distinguishes an argument from the prose after a command: an argument is in
// capitals, a path, shortened, a number, or a word that the verb knows.
func isArgument(cmd *cobra.Command, word string) bool {
	return slices.Contains(cmd.ValidArgs, word) || word == "-" || regexp.MustCompile(`^[A-Z][A-Z0-9_-]*$|[/…\d]|\.(txt|json|efi|bin|log|csr|pem|com|booted)$`).MatchString(word)
}

// complete checks that everything that a verb needs is present.
func complete(cmd *cobra.Command, args []string) error {
	if !cmd.Runnable() || cmd.HasSubCommands() && cmd.Name() != "verifier" {
		return errors.New("it only prints its help")
	}
	if err := cmd.ValidateRequiredFlags(); err != nil {
		return err
	}
	if err := cmd.ValidateFlagGroups(); err != nil {
		return err
	}
	set := func(name string) bool { return cmd.Flags().Changed(name) }
	path := strings.TrimPrefix(cmd.CommandPath(), "kleidi ")
	switch { // these are checks of RunE
	case path == "keyring restore" && len(args) == 0 && !set("previous"):
		return errors.New("it wants FILE or --previous")
	case path == "slot add" && slices.Contains(args, "recovery") && !set("recipient"):
		return errors.New("it wants --recipient")
	case path == "bootstate add" && !set("systemd") && (len(args) == 0 || !set("public-key")):
		return errors.New("it wants FILE and --public-key, or --systemd")
	}
	if slices.Contains(args, standIn) && path == "slot add" {
		return nil // one of the accepted types
	}
	return cmd.ValidateArgs(args)
}
